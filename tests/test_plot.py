# SPDX-License-Identifier: Apache-2.0
"""`rcc plot`: what is drawn are the numbers of the files, and files stay the same as long as those do."""

import importlib
import json
import math
import sys

import matplotlib as mpl
import numpy as np
import pytest
from plotted import lines, metrics, write

from rcc_hf.cli import main
from rcc_hf.plotting.figures import KINDS, draw, save
from rcc_hf.plotting.labels import bytes_text, file_name, tokens_text
from rcc_hf.plotting.results import read_results
from rcc_hf.plotting.styles import assign_styles

RATIOS = (8, 16, 32)
LENGTHS, DEPTHS = (4096, 8192, 131072), (0.0, 0.5, 1.0)
COSTS = {"time_to_first_token": 0.5, "decode_tokens_per_second": 60.0, "peak_bytes": 2**34, "nbytes": 2**20}


@pytest.fixture
def qa(tmp_path):
    """Written in an order that is not that of the ratios."""
    ours = [metrics("qa", "rcc", ratio, 0.48 - ratio / 200, nbytes_per_example=2**24 / ratio) for ratio in (32, 8, 16)]
    peer = [metrics("qa", "snapkv", ratio, 0.4 - ratio / 100, nbytes_per_example=2**25 / ratio) for ratio in RATIOS]
    full = metrics("qa", "full", mean=0.5, nbytes_per_example=2**24)
    return write(tmp_path / "qa", *ours, *peer, full, metrics("qa", "none", mean=0.1, nbytes_per_example=0))


@pytest.fixture
def passkey(tmp_path):
    groups = [
        {"length": length, "depth": depth, "num_examples": 10}
        | {"string_match": {"mean": (1 - depth / 2) * 4096 / length, "stderr": 0.01}}
        for length in LENGTHS
        for depth in DEPTHS
    ]
    return write(tmp_path / "passkey", metrics("passkey", "rcc", 16, 0.6, "string_match", groups=groups[1:]))


@pytest.fixture
def cost(tmp_path):
    def groups(scale):
        return [{"length": x} | {name: scale * x * value for name, value in COSTS.items()} for x in LENGTHS]

    full = [*groups(1), {"length": 2**20} | dict.fromkeys(COSTS)]
    runs = [metrics("cost", "rcc", ratio, overall={}, groups=groups(1 / ratio)) for ratio in RATIOS]
    nothing = [group | {"nbytes": 0} for group in groups(1 / 1000)]
    return write(
        tmp_path / "cost", *runs, metrics("cost", "full", overall={}, groups=full),
        metrics("cost", "none", overall={}, groups=nothing),
    )  # fmt: skip


@pytest.fixture
def perplexity(tmp_path):
    def groups(mean):
        return [
            {"history": x, "num_examples": 5, "nll": {"mean": mean - x / 1e4, "stderr": 0.1}} for x in (0, 512, 2048)
        ]

    runs = [
        metrics("perplexity", name, ratio, overall={"nll": 2.9}, groups=groups(3))
        for name, ratio in (("rcc", 8), ("full", None))
    ]
    return write(tmp_path / "perplexity", *runs)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bars(axes, index):
    """The lengths of the halves of a line's error bars."""
    return [(end - start) / 2 for (_, start), (_, end) in axes.containers[index][2][0].get_segments()]


def test_ratio_draws_the_means_by_ratio_and_references_across(qa):
    figures = draw(read_results([qa]), kind="ratio")
    assert list(figures) == ["ratio-qa-f1"]
    (axes,) = figures["ratio-qa-f1"].axes
    drawn = lines(axes)
    assert drawn["RCC (ours)"] == ([8, 16, 32], pytest.approx([0.44, 0.40, 0.32]))
    assert drawn["snapkv"] == ([8, 16, 32], pytest.approx([0.32, 0.24, 0.08]))
    assert drawn["full context"][1] == [0.5, 0.5]
    assert drawn["no context"][1] == [0.1, 0.1]
    assert bars(axes, 0) == pytest.approx([0.02] * 3)
    assert legend(figures["ratio-qa-f1"]) == ["RCC (ours)", "full context", "no context", "snapkv"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8x", "16x", "32x"]


def test_bytes_draws_the_means_by_bytes_and_names_our_ratios(qa):
    figures = draw(read_results([qa]), kind="bytes", metric="exact_match", title="A title of mine")
    (axes,) = figures["bytes-qa-exact_match"].axes
    drawn = lines(axes)
    assert drawn["RCC (ours)"] == ([2**19, 2**20, 2**21], pytest.approx([0.16, 0.20, 0.22]))
    assert drawn["snapkv"][0] == [2**20, 2**21, 2**22]
    assert [text.get_text() for text in axes.texts] == ["8x", "16x", "32x"]
    star = next(line for line in axes.lines if line.get_marker() == "*")
    assert np.asarray(star.get_data()).ravel().tolist() == [2**24, 0.25]
    assert axes.get_xscale() == "log"
    assert figures["bytes-qa-exact_match"].get_suptitle() == "A title of mine"


def test_ours_is_drawn_thicker_and_above_and_bold(qa):
    figure = draw(read_results([qa]), kind="ratio")["ratio-qa-f1"]
    ours, *others = (container.lines[0] for container in figure.axes[0].containers)
    assert all(ours.get_linewidth() > line.get_linewidth() and ours.zorder > line.zorder for line in others)
    assert [text.get_fontweight() for text in figure.legends[0].get_texts()][:2] == ["bold", "normal"]


def test_every_method_has_a_colour_and_a_marker_and_dashes_of_its_own():
    known = ["rcc", "full", "none", "wrong", "wrong-rcc", "truncate-head", "truncate-tail", "window-sink", "mean-pool"]
    styles = assign_styles([*known, "snapkv", "knorm", "expected_attention"])
    looks = [style.line() for style in styles.values()]
    assert len({(look["color"], look["marker"], str(look["linestyle"])) for look in looks}) == len(styles)
    assert len({look["color"] for look in looks}) == len(styles) - 1  # no context, another context: two greys
    assert assign_styles(known)["mean-pool"] == styles["mean-pool"]


def test_heatmap_draws_depths_by_lengths_with_numbers(passkey):
    figures = draw(read_results([passkey]))
    assert list(figures) == ["heatmap-passkey-string_match-rcc-16x", "ratio-passkey-string_match"]
    axes, _ = figures["heatmap-passkey-string_match-rcc-16x"].axes
    table = axes.collections[0].get_array()
    expected = [[None, 0.5, 1 / 32], [0.75, 0.375, 0.75 / 32], [0.5, 0.25, 0.5 / 32]]
    assert [[None if np.ma.is_masked(x) else float(x) for x in row] for row in table] == expected
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["\N{EN DASH}", "0.50", "0.03", "0.75", "0.38", "0.02", "0.50", "0.25", "0.02"]
    assert [text.get_color() for text in axes.texts[1:4]] == ["black", "white", "black"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4K", "8K", "128K"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0 %", "50 %", "100 %"]
    assert axes.yaxis_inverted()


def test_groups_that_differ_in_other_metadata_are_averaged_by_examples(tmp_path):
    groups = [
        {"length": 64, "depth": 0, "filler": "a", "num_examples": 30, "f1": {"mean": 0.2, "stderr": 0.04}},
        {"length": 64, "depth": 0, "filler": "b", "num_examples": 10, "f1": {"mean": 0.6, "stderr": 0.16}},
        {"length": 64, "num_examples": 10, "f1": 0.9},
    ]
    write(tmp_path, metrics("needles", "rcc", 8, groups=groups))
    figure = draw(read_results([tmp_path]), kind="heatmap")["heatmap-needles-f1-rcc-8x"]
    assert figure.axes[0].collections[0].get_array().tolist() == [[pytest.approx(0.3)]]


def test_a_heatmap_of_many_lengths_has_no_numbers_too_small_to_read(tmp_path):
    groups = [{"length": 100 * (x + 1), "depth": 0, "f1": 1.0} for x in range(40)]
    write(tmp_path, metrics("needles", "rcc", 8, groups=groups))
    axes = draw(read_results([tmp_path]), kind="heatmap")["heatmap-needles-f1-rcc-8x"].axes[0]
    assert not axes.texts
    assert len(axes.get_xticklabels()) < 20


def test_cost_draws_a_panel_for_each_measurement(cost):
    figure = draw(read_results([cost]))["cost"]
    drawn = {axes.get_title(loc="left"): lines(axes) for axes in figure.axes}
    assert len(drawn) == len(COSTS)
    for (title, panel), value in zip(drawn.items(), COSTS.values(), strict=True):
        for ratio in RATIOS:
            assert panel[f"RCC (ours) {ratio}x"] == (list(LENGTHS), [1 / ratio * x * value for x in LENGTHS])
        assert panel["full context"] == (list(LENGTHS), [x * value for x in LENGTHS])
        assert ("no context" in panel) == (title != "memory kept of the context")
    assert sorted(legend(figure)) == sorted({label for panel in drawn.values() for label in panel})
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 4


def test_cost_without_peak_memory_leaves_its_panel_out(tmp_path):
    measured = {"time_to_first_token": 1.5, "decode_tokens_per_second": 60, "peak_bytes": None, "nbytes": 2**20}
    groups = [{"length": x} | measured for x in (512, 1024)]
    write(tmp_path, metrics("cost", "rcc", 8, overall={}, groups=groups))
    figure = draw(read_results([tmp_path]))["cost"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["time to first token (s)", "decoding (tokens/s)", "memory kept of the context"]
    assert figure.axes[0].get_ylim()[0] == 0


def test_cost_of_no_context_alone_has_no_panel_of_what_is_kept(tmp_path):
    write(tmp_path, metrics("cost", "none", overall={}, groups=[{"length": 512, "peak_bytes": 2**30, "nbytes": 0}]))
    assert [axes.get_title(loc="left") for axes in draw(read_results([tmp_path]))["cost"].axes] == ["peak memory"]


def test_perplexity_draws_what_the_groups_have_by_history(perplexity):
    figures = draw(read_results([perplexity]), kind="perplexity")
    (axes,) = figures["perplexity-nll"].axes
    assert lines(axes)["RCC (ours) 8x"] == ([0, 512, 2048], [3, 3 - 0.0512, 3 - 0.2048])
    assert set(lines(axes)) == {"RCC (ours) 8x", "full context"}
    assert bars(axes, 0) == pytest.approx([0.1] * 3)
    assert "lower is better" in axes.get_ylabel()
    low, high = axes.get_xlim()
    assert low < 0 < 2048 < high


def test_models_of_one_method_are_lines_of_their_own(tmp_path):
    runs = [metrics("qa", "rcc", 8, mean, model=f"org/{name}") for mean, name in ((0.3, "one"), (0.4, "two"))]
    write(tmp_path, *runs)
    figure = draw(read_results([tmp_path]), kind="ratio")["ratio-qa-f1"]
    assert lines(figure.axes[0]) == {"RCC (ours), one": ([8], [0.3]), "RCC (ours), two": ([8], [0.4])}


def test_tasks_and_data_have_figures_of_their_own(tmp_path, qa):
    write(tmp_path / "more", metrics("benchmark", "rcc", 8, data="data/hotpotqa.jsonl"))
    figures = draw(read_results([qa, tmp_path / "more"]))
    assert set(figures) == {"ratio-qa-f1", "bytes-qa-f1", "ratio-benchmark-hotpotqa.jsonl-f1"}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (512, "512 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (1023 * 2**20, "1023 MiB"), (3 * 2**40, "3 TiB")],
)
def test_bytes_are_written_in_binary_units(count, text):
    assert bytes_text(count) == text


def test_tokens_and_file_names_are_short():
    assert [tokens_text(x) for x in (0, 100, 1000, 4096, 2**20, 3 * 2**20 + 1)] == [
        "0",
        "100",
        "1,000",
        "4K",
        "1M",
        "3,145,729",
    ]
    assert file_name(("ratio", "../org/a b:c", None, "f1")) == "ratio-a-b-c-f1"


def test_the_command_writes_both_formats_and_the_same_bytes_again(qa, passkey, cost, perplexity, tmp_path, capsys):
    folders = [str(qa), str(passkey), str(cost), str(perplexity)]
    for output in ("first", "second"):
        assert main(["plot", *folders, "--output", str(tmp_path / output)]) == 0
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("first", "second"))
    stems = ["bytes-qa-f1", "cost", "heatmap-passkey-string_match-rcc-16x", "perplexity-nll"]
    stems += ["ratio-passkey-string_match", "ratio-perplexity-nll", "ratio-qa-f1"]
    assert [file.name for file in first] == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert [file.read_bytes()[:8] for file in first if file.suffix == ".png"] == [b"\x89PNG\r\n\x1a\n"] * len(stems)
    for file in first:
        if file.suffix == ".svg":
            assert b"<dc:date>" not in file.read_bytes()
            assert b"<image" not in file.read_bytes()
    assert f"wrote    {first[0].with_name('cost.svg')}" in capsys.readouterr().out


def test_settings_of_the_user_change_nothing_and_are_not_changed(qa, tmp_path):
    with mpl.rc_context({"font.size": 30, "svg.hashsalt": "mine", "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        save(draw(read_results([qa]), kind="ratio"), tmp_path / "theirs", ["svg"])
        assert dict(mpl.rcParams) == before
    save(draw(read_results([qa]), kind="ratio"), tmp_path / "ours", ["svg"])
    theirs, ours = ((tmp_path / name / "ratio-qa-f1.svg").read_bytes() for name in ("theirs", "ours"))
    assert theirs == ours


def test_folders_are_searched_and_other_json_is_left_out(qa, tmp_path):
    (qa / "notes.json").write_text('{"hardware": "one GPU"}')
    (qa / "list.json").write_text("[1, 2]")
    (qa / "renamed.json").write_text(json.dumps(metrics("qa", "mean-pool", 8)))
    results = read_results([qa, qa / "qa-full-ase-None" / "metrics.json"])
    assert len(results) == 9
    assert sum(result.method == "mean-pool" for result in results) == 1


def test_equal_runs_of_a_reference_are_one_line(qa):
    write(qa / "again", metrics("qa", "full", 8, 0.5, nbytes_per_example=2**24))
    figure = draw(read_results([qa]), kind="ratio")["ratio-qa-f1"]
    assert legend(figure).count("full context") == 1


def test_differing_runs_of_a_reference_are_refused(qa):
    write(qa / "again", metrics("qa", "full", 8, 0.51))
    with pytest.raises(ValueError, match="'full', which has no ratio, and differ; give one"):
        draw(read_results([qa]), kind="ratio")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no task, method, model"),
        ({"task": "qa", "method": 3, "model": "m"}, "has no method .* rcc evaluate did not write it"),
        (metrics("qa", "rcc", "8x"), "ratio is '8x'; it must be a finite number"),
        (metrics("qa", "rcc", -8), "ratio is -8; it cannot be negative"),
        (metrics("qa", "rcc", overall=[]), "overall must be an object"),
        (metrics("qa", "rcc", overall={"f1": "good"}), "overall, f1 is 'good'; it must be"),
        (metrics("qa", "rcc", overall={"f1": math.nan}), "overall, f1 is nan; it must be"),
        (metrics("qa", "rcc", groups={}), "groups must be a list"),
    ],
)
def test_files_that_are_no_results_are_refused(content, message, tmp_path):
    (tmp_path / "metrics.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_results([tmp_path])


def test_two_results_of_the_same_are_refused(qa, tmp_path):
    write(tmp_path / "again", metrics("qa", "rcc", 8, 0.1))
    with pytest.raises(ValueError, match=r"both hold task 'qa', method 'rcc', ratio 8 of 'org/base-rcc'; give one"):
        read_results([qa, tmp_path / "again"])


def test_a_group_without_the_metric_is_refused(tmp_path):
    write(tmp_path, metrics("needles", "rcc", 8, groups=[{"length": 64, "depth": 0, "bleu4": 1}]))
    with pytest.raises(ValueError, match="group 0 has no 'f1'; it has length, depth, bleu4"):
        draw(read_results([tmp_path]), kind="heatmap")


def test_results_without_a_common_metric_are_refused(qa):
    write(qa / "more", metrics("qa", "mean-pool", 8, overall={"rougeL": 0.3}))
    with pytest.raises(ValueError, match=r"task 'qa' have no metric in common .*: rougeL"):
        draw(read_results([qa]))
    with pytest.raises(ValueError, match=r"has no metric 'f1' \(it has: rougeL\), other results of its task do"):
        draw(read_results([qa]), metric="f1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "heatmap"], "none of the 8 results is of groups with length and depth"),
        (["--metric", "bleu4"], "with the metric 'bleu4' (the results have: exact_match, f1)"),
        (["--format", "pdf"], "format is pdf; it must be one of png, svg"),
    ],
)
def test_what_cannot_be_drawn_is_a_message(arguments, message, qa, tmp_path, capsys):
    assert main(["plot", str(qa), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absent_and_empty_folders_are_a_message(tmp_path, capsys):
    assert main(["plot", str(tmp_path / "absent"), "--output", str(tmp_path)]) == 2
    assert "absent does not exist" in capsys.readouterr().err
    assert main(["plot", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "no folder given holds a metrics.json" in capsys.readouterr().err


def test_an_unknown_kind_names_the_known_ones(qa):
    with pytest.raises(ValueError, match=", ".join(KINDS)):
        draw(read_results([qa]), kind="pie")


def test_without_matplotlib_the_message_names_the_extra(qa, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "rcc_hf.plotting"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with monkeypatch.context() as context:
        context.setattr(importlib.import_module("rcc_hf.cli.plot"), "read_results", read_results)
        assert main(["plot", str(qa), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "matplotlib" in error
    assert "pip install 'rcc_hf[plot]'" in error
