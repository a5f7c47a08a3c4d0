"""The table of a sweep, read and compared: refusals name file, line and column; made-up savings are found again."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from power_law_sweep import SAVING, sweep, written

from almlip_jax.errors import InputError
from almlip_jax.evaluation.comparison import compare, evolution, learning_curves, performance_profiles
from almlip_jax.evaluation.summary import latex, markdown, number
from almlip_jax.evaluation.tidy import KEYS, by_case, columns, read_tables


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return sweep(seeds=8)


def test_a_table_comes_back_as_it_was_written(table, tmp_path):
    back = read_tables([written(tmp_path / "results.csv", table)])
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert tuple(back) == columns()
    halves = [written(tmp_path / f"{n}.csv", table[table["seed"] % 2 == n]) for n in (0, 1)]
    pd.testing.assert_frame_equal(
        read_tables(halves).sort_values([*KEYS], ignore_index=True), back.sort_values([*KEYS], ignore_index=True)
    )


def test_rounds_that_a_point_did_not_reach_are_left_out(table, tmp_path):
    cut = table.astype(object)
    last = (cut["seed"] == 3) & (cut["round"] == 5)
    cut.loc[last, ["labels", *columns()[8:]]] = None
    back = read_tables([written(tmp_path / "results.csv", cut)])
    assert len(back) == len(table) - last.sum()
    assert compare(back).rows  # seeds of different length can be compared


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("forces_rmse", "-0.1", r"line 4: forces_rmse '-0.1' is not an error"),
        ("forces_rmse", "much", r"line 4: forces_rmse 'much' is not a number"),
        ("crps", "inf", r"line 4: crps 'inf' is infinite"),
        ("seed", "1.5", r"line 4: seed '1.5' is not a count"),
        ("selector", "", r"line 4: selector '' is empty"),
        ("labels", "0", r"line 4: labels '0' is not a number of labels"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_sentence(table, tmp_path, column, value, told):
    spoilt = table.astype(str)
    spoilt.loc[2, column] = value
    with pytest.raises(InputError, match=rf"spoilt\.csv, {told}"):
        read_tables([written(tmp_path / "spoilt.csv", spoilt)])


def test_lines_are_counted_past_rounds_that_were_not_reached(table, tmp_path):
    spoilt = table.astype(str)
    spoilt.loc[0, "labels"] = ""
    spoilt.loc[2, "seed"] = "x"
    with pytest.raises(InputError, match="line 4: seed 'x'"):
        read_tables([written(tmp_path / "spoilt.csv", spoilt)])


def test_other_files_and_repeated_rows_are_refused(table, tmp_path):
    path = written(tmp_path / "results.csv", table)
    with pytest.raises(InputError, match="a row comes twice: system water"):
        read_tables([path, path])
    with pytest.raises(InputError, match="lacks column 'crps'"):
        read_tables([written(tmp_path / "less.csv", table.drop(columns="crps"))])
    some = ["stress_rmse", "stress_mae", "dipole_rmse", "dipole_mae"]
    without = table.drop(columns=some)  # as no system of many a sweep has stresses or dipoles
    empty = table.assign(**dict.fromkeys(some, np.nan))
    pd.testing.assert_frame_equal(read_tables([written(tmp_path / "open.csv", without)]), empty, check_dtype=False)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="not a table"):
        read_tables([tmp_path / "empty.csv"])
    with pytest.raises(InputError, match="no selector 'best'"):
        compare(table, "best")
    with pytest.raises(InputError, match="choose one of"):
        learning_curves(table, "speed")


def test_known_savings_are_found_in_every_case(table):
    found = compare(table)
    assert len(found.rows) == 4 * len(SAVING)
    for row in found.rows:
        if row.selector == "random":
            assert row.final is None and row.area is None
            continue
        assert row.area is not None and row.saving is not None and row.final is not None and row.seeds == 8
        assert row.area.ratio == pytest.approx(SAVING[row.selector] ** -0.7, rel=0.03)
        better = SAVING[row.selector] > 1
        assert (row.area.high < 1) == better and (row.area.low > 1) == (not better)
        assert max(row.area_holm) < 0.05  # 2 tests of 8 pairs that all agree: 2 * 2^-7
        if better:
            assert float(row.saving.low) == pytest.approx(1.6, rel=0.1)
            assert row.reached == 8
        else:
            assert float(row.saving.high) <= 1.0  # it never comes down to the final error of random


def test_pairs_are_formed_by_seed_and_not_by_place(table):
    shuffled = table.sample(frac=1.0, random_state=0)
    few = shuffled[(shuffled["selector"] != "lcmd") | (shuffled["seed"].isin([5, 2, 7]))]
    row = next(row for row in compare(few).rows if row.selector == "lcmd")
    part = next(part for case, part in by_case(table) if case == row.case)
    last = part[part["round"] == 5].pivot(index="seed", columns="selector", values="forces_rmse").loc[[2, 5, 7]]
    assert row.seeds == 3 and row.final is not None
    assert row.final.ratio == pytest.approx(np.exp(np.log(last["lcmd"] / last["random"]).mean()))
    assert any("3 seeds Wilcoxon's test cannot" in note for note in compare(few).notes)


def test_profiles_rank_the_selectors(table):
    found = performance_profiles(learning_curves(table))
    assert found.selectors[0] == "random" and len(found.problems) == 4 * 8
    best = np.array(found.selectors)[np.argmin(found.ratios, axis=1)]
    assert (best == "lcmd").all()
    assert np.isinf(found.ratios[:, found.selectors.index("top_k")]).mean() > 0.8


def test_evolution_keeps_seeds_and_rounds(table):
    found = evolution(table, "sigma_batch", by_test=False)
    assert {case.test for case in found} == {""}
    one = next(iter(found.values()))["lcmd"]
    np.testing.assert_array_equal(one.rounds, range(6))
    np.testing.assert_allclose(one.values, np.tile(3 / (20.0 + 15 * np.arange(6)), (8, 1)))


def test_tables_hold_the_numbers_of_the_comparison(table):
    found = compare(table[table["system"] == "Zundel cation"])
    frame = found.frame()
    text = markdown(found)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, body = cells[0], cells[2:]
    assert len(body) == len(frame) and {len(row) for row in cells} == {len(header)}
    for row, (_, flat) in zip(body, frame.iterrows(), strict=True):
        assert row[header.index("selector")] == flat["selector"]
        error = row[header.index("force RMSE (meV/Å)")].split()[0]
        assert error == number(1e3 * flat["error"])
        if flat["selector"] != "random":
            ratio = row[header.index("mean error / random")]
            assert ratio.split()[0] == number(flat["area_ratio"]) and number(flat["area_high"]) in ratio
    lines = latex(found).splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 1 + len(frame) and {line.count("&") for line in rows} == {len(header) - 1}
    assert r"top\_k" in "".join(rows) and lines[-1] == r"\end{tabular}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "0.0123"),
        (0.94997, "0.950"),
        (0.99961, "1.00"),
        (1234.5, "1230"),
        (-1.0, "-1.00"),
        (0.0, "0"),
        (np.nan, "-"),
        (np.inf, "inf"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert number(value) == text
