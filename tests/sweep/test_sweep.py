"""Sweeps: what points share, what ends up in the table, and that neither interruptions nor company change a row."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tiny_sweep import LEAKED, POOL, REPEATED, SECTIONS, Killed, Watching, config_of, springs, sweep, timeless
from typer.testing import CliRunner

from almlip_jax.config import config_text, load_settings
from almlip_jax.errors import InputError
from almlip_jax.evaluation.tidy import columns
from almlip_jax.figures.command import make
from almlip_jax.files import read_csv, read_json
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.packing import pack, plan_batches
from almlip_jax.structures.repeats import geometry_key
from almlip_jax.sweep import SweepConfig, parse_only, worker
from almlip_jax.sweep.crew import Crew, shares
from almlip_jax.sweep.points import Point, all_points, point_groups
from almlip_jax.sweep.pools import plan_for_budget, read_pool
from almlip_jax.sweep.run import SweepResult, render_result

SELECTORS, SEEDS = ("random", "max_det"), (0, 1)


def folder_of(study, selector: str, seed: int) -> Path:
    return study.out / "points" / "springs" / selector / f"seed{seed}-batch3-ensemble2"


def picks_of(study, selector: str, seed: int) -> dict:
    return read_json(folder_of(study, selector, seed) / "picks.json")


def test_every_point_round_and_test_set_has_a_row(study):
    rows = read_csv(study.out / "results.csv")
    assert tuple(rows[0]) == columns()
    assert columns()[:8] == ("system", "selector", "seed", "ensemble_size", "batch_size", "round", "labels", "test")
    places = [(row["selector"], row["seed"], row["round"], row["test"]) for row in rows]
    assert places == list(product(SELECTORS, SEEDS, range(3), ("near", "far")))
    for row in rows:
        assert row["labels"] == 4 + 3 * row["round"] and row["ensemble_size"] == 2 and row["batch_size"] == 3
        assert row["energy_rmse"] >= row["energy_mae"] > 0 and row["forces_rmse"] >= row["forces_mae"] > 0
        assert row["stress_rmse"] is None and row["dipole_mae"] is None  # these structures have none
        assert (row["sigma_batch"] is None) == (row["seconds_select"] is None) == (row["round"] == 2)
        assert row["monitor"] == "force_std_mean"
        parts = [row[name] or 0.0 for name in ("seconds_train", "seconds_select", "seconds_label")]
        assert row["seconds_train"] > 0 and sum(parts) <= row["seconds"]
    assert (study.result.points, study.result.complete, study.result.cut) == (4, 4, 0)
    assert len(study.result.summary()["curves_end"]) == 4


def test_stresses_and_dipoles_are_shown_beside_forces_where_a_system_has_them():
    point = dict.fromkeys(columns()) | {"selector": "random", "ensemble_size": 2, "batch_size": 3, "test": "t"}
    one = point | {"system": "molecule", "labels": 9, "forces_rmse": 0.3}
    two = point | {"system": "crystal", "labels": 9, "forces_rmse": 0.1, "stress_rmse": 0.004, "stress_mae": 0.003}
    last = two | {"seed": 1, "forces_rmse": 0.2, "stress_rmse": 0.002}
    one["dipole_rmse"] = 0.05
    whole = SweepResult(Path("out"), [one, two, last], 3, 3, 0)
    ends = whole.summary()["curves_end"]
    assert [end["stress_rmse"] for end in ends] == [None, pytest.approx(0.003)]
    assert [end["forces_rmse"] for end in ends] == [0.3, pytest.approx(0.15)]
    shown = {str(column.header): list(column.cells) for column in render_result(whole).columns}
    assert shown["F RMSE meV/A"] == ["300", "150"] and shown["S RMSE meV/A^3"] == ["-", "3"]
    assert shown["dipole RMSE me*A"] == ["50", "-"]
    titles = [{column.header for column in render_result(replace(whole, rows=[row])).columns} for row in (one, two)]
    assert "S RMSE meV/A^3" not in titles[0] and "dipole RMSE me*A" not in titles[1]


def test_points_of_a_seed_begin_alike_and_seeds_do_not(study):
    rows = read_csv(study.out / "results.csv")
    first = [row for row in rows if row["round"] == 0]
    errors = {(row["selector"], row["seed"], row["test"]): row["forces_rmse"] for row in first}
    for seed, test in product(SEEDS, ("near", "far")):
        assert errors["random", seed, test] == errors["max_det", seed, test]
        assert picks_of(study, "random", seed)["initial"] == picks_of(study, "max_det", seed)["initial"]
    assert errors["random", 0, "near"] != errors["random", 1, "near"]
    assert picks_of(study, "random", 0)["initial"] != picks_of(study, "random", 1)["initial"]
    assert sum(1 for _ in (study.out / "firsts").rglob("potential.json")) == len(SEEDS)


def test_nothing_is_chosen_twice_or_taken_from_a_test_set(study):
    pool = read_structures(study.folder / "pool.extxyz")
    tests = [*read_structures(study.folder / "near.extxyz"), *read_structures(study.folder / "far.extxyz")[::2]]
    held_out = {geometry_key(frame) for frame in tests}
    assert len(pool) == POOL + REPEATED + LEAKED and sum(geometry_key(frame) in held_out for frame in pool) == LEAKED
    for selector, seed in product(SELECTORS, SEEDS):
        picks = picks_of(study, selector, seed)
        batches = [one["indices"] for one in picks["rounds"]]
        assert [len(batch) for batch in batches] == [3, 3, 0] and picks["pool_size"] == POOL - 4
        chosen = [*picks["initial"], *batches[0], *batches[1]]
        keys = {geometry_key(pool[place]) for place in chosen}
        assert len(keys) == len(chosen) == 10 and not keys & held_out


def test_the_table_says_what_the_last_potential_says(study):
    potential = Potential.load(folder_of(study, "max_det", 1) / "potentials" / "002")
    frames = read_structures(study.folder / "far.extxyz")[::2]
    errors = np.concatenate(potential.evaluate(frames).forces) - np.concatenate([one.get_forces() for one in frames])
    row = read_csv(study.out / "results.csv")[-1]
    assert (row["selector"], row["seed"], row["round"], row["test"]) == ("max_det", 1, 2, "far")
    assert row["forces_rmse"] == pytest.approx(math.sqrt(np.mean(errors**2)), rel=1e-5)
    validated = [one["validation"] for one in read_json(folder_of(study, "max_det", 1) / "state.json")["rounds"]]
    assert validated[2] == potential.metadata["validation_forces_rmse"] and min(validated) > 0
    assert [set(one.symbols) for one in potential.compositions] == [{"H"}]  # H3 and H4 say the same
    alike = read_json(folder_of(study, "random", 1) / "state.json")["rounds"]
    assert alike[0]["validation"] == validated[0] and alike[2]["validation"] != validated[2]


def test_nothing_compiles_after_the_first_rounds(study):
    """Two first trainings, then two groups of two points: three rounds each."""
    names = [name for name, _ in study.stages]
    group = ["select", "select", "train", "test", "select", "test", "select", "train", "test", "test"]
    assert names == ["train", "test", "test", *group, *group]
    compiled = [number for _, number in study.stages]
    assert sum(compiled[:2]) > 0 and sum(compiled[10:13]) == 0  # the second training of the first group
    assert sum(compiled[15:]) == 0  # of the second group, all but its selector


def test_a_sweep_that_was_killed_ends_as_one_that_was_not(study, tmp_path):
    for kill in (("train", 1), ("select", 3)):
        with pytest.raises(Killed):
            sweep(study.folder, tmp_path, progress=Watching(kill=kill))
    again = Watching()
    sweep(study.folder, tmp_path, progress=again)
    assert timeless(tmp_path) == timeless(study.out)
    assert len(again.stages) < len(study.stages)
    once_more = Watching()
    result = sweep(study.folder, tmp_path, progress=once_more)
    assert not once_more.stages and result.complete == 4


def test_a_point_alone_gives_its_row_of_the_whole(study, with_desks, monkeypatch, tmp_path):
    """Also where an executor of another package calls what works on it."""
    monkeypatch.setattr(worker, "prepare_jax", lambda precision: None)  # of a process of its own
    only = parse_only(["selector=max_det,seed=1"], config_of(study.folder))
    result = sweep(study.folder, tmp_path, only=only, executor={"kind": "desks"})
    whole = [row for row in timeless(study.out) if row["selector"] == "max_det" and row["seed"] == 1]
    assert timeless(tmp_path) == whole and (result.complete, result.points) == (1, 4)


def test_strata_take_turns_in_a_sweep_too(study, tmp_path):
    folder = shutil.copytree(study.folder, tmp_path / "told", ignore=shutil.ignore_patterns("*out*"))
    frames = read_structures(folder / "pool.extxyz", require_labels=True)
    for frame in frames:
        frame.info["kind"] = f"of {len(frame)}"
    write_structures(folder / "pool.extxyz", frames)
    selector = {"kind": "stratified", "by": "kind", "shares": {"of 4": 1}, "selector": {"kind": "max_det"}}
    sweep(folder, tmp_path / "out", selectors={"told": selector}, seeds=1, side_by_side=1)
    rounds = read_json(next((tmp_path / "out").glob("points/*/*/*/picks.json")))["rounds"]
    sizes = [[len(frames[place]) for place in one["indices"]] for one in rounds]
    assert sizes == [[4] * 3, [4] * 3, []]


def test_a_point_that_takes_too_long_ends_says_so_and_may_go_on(study, tmp_path):
    one = {"seeds": 1, "side_by_side": 1, "only": {"selector": {"random"}}}
    result = sweep(study.folder, tmp_path, **one, seconds_per_point=1e-6)
    rows = read_csv(tmp_path / "results.csv")
    assert [(row["round"], row["forces_rmse"] is None) for row in rows[::2]] == [(0, False), (1, True), (2, True)]
    assert rows[2]["labels"] is None and (result.complete, result.cut) == (0, 1)
    result = sweep(study.folder, tmp_path, **one)
    longer = read_csv(tmp_path / "results.csv")
    assert longer[0] == rows[0] and longer[-1]["labels"] == 10 and (result.complete, result.cut) == (1, 0)


def test_a_warm_start_goes_on_from_the_round_before(study, tmp_path):
    training = SECTIONS["systems"]["springs"]["training"] | {"warm_steps": 1}
    systems = {"springs": SECTIONS["systems"]["springs"] | {"training": training}}
    sweep(study.folder, tmp_path, {"selector": {"random"}}, systems=systems, warm_start=True)
    curve = [
        row["forces_rmse"] for row in read_csv(tmp_path / "results.csv") if (row["seed"], row["test"]) == (1, "far")
    ]
    np.testing.assert_allclose(curve, curve[0], rtol=1e-6)  # the rate of the only step, at the end of a cosine, is 0


def test_damaged_files_are_one_sentence_or_do_no_harm(study, damages, tmp_path):
    """Records of a sweep that is over, and its table in a figure, replaced by every kind of wrong content."""
    point = folder_of(study, "random", 0).relative_to(study.out)
    first = next((study.out / "firsts").rglob("first.json")).relative_to(study.out)
    folder, rows = tmp_path / "sweep", timeless(study.out)
    shutil.copytree(study.out, folder)
    for name in (point / "state.json", first, Path("versions.json")):
        whole = (folder / name).read_bytes()
        for damage, content in damages(folder / name, parts=False).items():
            (folder / name).write_bytes(content)
            try:
                assert sweep(study.folder, folder).points == 4
                assert timeless(folder) == rows, (name, damage)
            except InputError as error:
                assert name.name in str(error) and "\n" not in str(error), (name, damage)
        (folder / name).write_bytes(whole)
    for damage, content in damages(folder / "results.csv").items():
        (folder / "results.csv").write_bytes(content)
        if damage != "half":  # a shorter table
            for figure in ("all", "training"):
                with pytest.raises(InputError, match=r"results\.csv"):
                    make(figure, [folder / "results.csv"], tmp_path / "figures")
    sweep(study.folder, folder)
    assert timeless(folder) == rows, "the table is made anew"


def test_other_settings_need_another_folder(study):
    longer = SECTIONS["systems"]["springs"] | {"training": {"max_steps": 7}}
    for changes, name in (({"systems": {"springs": longer}}, "training"), ({"rounds": 3}, "rounds"),
                          ({"side_by_side": 1}, "side by side"),
                          ({"rounds": 1, "batch_sizes": [3, 6]}, "rounds")):  # as many labels at the end  # fmt: skip
        with pytest.raises(InputError, match=f"made with another .*{name}.*--out"):
            sweep(study.folder, study.out, **changes)


def test_groups_follow_from_the_config_alone(study):
    config = config_of(study.folder, seeds=3, side_by_side=4)
    everything = point_groups(config, all_points(config))
    assert [group.width for group in everything] == [4, 2]
    (alone,) = point_groups(config, [Point("springs", "max_det", 0, 3, 2)])
    assert alone.members == everything[0].members and alone.wanted == (3,)


def test_any_choice_of_structures_fits(study):
    """The largest ones, and orders that fill batches badly."""
    pool = read_pool(config_of(study.folder), "springs")
    training = config_of(study.folder).systems["springs"].training
    capacity = plan_for_budget(pool, 3.0, training, 10)
    largest = sorted(pool.frames, key=len)[-10:]
    assert capacity.atoms == sum(len(frame) for frame in largest) + 1 and capacity.structures == 11
    pack(largest, pool.species, 3.0, neighbors=capacity.batch.neighbors, atoms=capacity.atoms, slots=11)
    for order in (sorted(pool.frames, key=len)[4:14], largest[::2] + pool.frames[:5]):
        packed = pack(order, pool.species, 3.0, neighbors=3)
        plan_batches(packed, np.arange(10), capacity.batch, capacity.steps - training.validate_every)


def test_cores_are_shared_out():
    parts = shares(2)
    assert len(parts) == 2 and all(parts) and len({len(part) for part in parts}) == 1


def test_a_process_that_dies_before_it_gets_work_is_named(tmp_path):
    config = SweepConfig.model_validate(SECTIONS)
    (group, *_) = point_groups(config, all_points(config))
    with Crew(config, tmp_path, 1) as crew:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        with pytest.raises(InputError, match=r"ended by itself \(exit status -9"):
            crew.work([group], lambda _: None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("systems.springs.pool=nowhere.extxyz", "nowhere.extxyz cannot be read"),
        ("selectors.random.kind=randon", "'randon' is not a valid kind; did you mean 'random'?"),
        ("rounds=9", "has 20 structures that are in no other set, fewer than the 31"),
        ("warm_start=true", "warm_start needs systems.springs.training.warm_steps"),
        ("systems.springs.training.warm_steps=9", "warm_steps counts with warm_start: true of the whole sweep only"),
        ("systems.springs.training.final_steps=9", "training.final_steps is not used here"),
        ("systems.springs.training.replay=9", "training.replay is not used here"),
        ("systems.springs.model={kind: user, function: 'nowhere:f'}", "springs.model: 'nowhere:f' cannot be imported"),
        ("selectors.random={kind: user, function: 'nowhere:f'}", "selectors.random: 'nowhere:f' cannot be imported"),
    ],
)
def test_what_cannot_work_is_one_sentence(study, tmp_path, change, sentence):
    file = tmp_path / "sweep.yaml"
    file.write_text(config_text(config_of(study.folder)))
    with pytest.raises(InputError, match=sentence.replace("?", r"\?")) as caught:
        config = load_settings(SweepConfig, file, [change]).based(tmp_path)
        sweep_of(config, tmp_path / "out")
    assert "\n" not in str(caught.value)


def sweep_of(config: SweepConfig, out: Path) -> None:
    from almlip_jax.sweep import run_sweep

    run_sweep(config, out)


def test_points_that_do_not_exist_are_named(study):
    config = config_of(study.folder)
    with pytest.raises(InputError, match="no selector 'max_dett'; did you mean 'max_det'"):
        parse_only(["selector=max_dett"], config)
    with pytest.raises(InputError, match="'pool=3' does not name points"):
        parse_only(["pool=3"], config)


def test_the_command_prints_and_writes_what_is_there(study, monkeypatch, tmp_path):
    from almlip_jax import cli, compilation

    monkeypatch.setattr(compilation, "prepare_jax", lambda precision: None)
    file = tmp_path / "sweep.yaml"
    file.write_text(config_text(config_of(study.folder)))
    found = tmp_path / "found.json"
    done = CliRunner().invoke(cli.app, ["sweep", str(file), "--out", str(study.out), "--json", str(found)])
    assert done.exit_code == 0 and "4 of 4 points complete" in done.output
    assert json.loads(found.read_text())["complete"] == 4


@pytest.mark.slow
def test_processes_give_the_same_table(study, tmp_path):
    sweep(study.folder, tmp_path, executor={"kind": "local", "processes": 2})
    assert timeless(tmp_path) == timeless(study.out)


def test_labels_of_the_sets_are_consistent():
    """Forces are minus the gradient of the energy: the sets can be learned."""
    atoms = springs(np.random.default_rng(0), 0.1)
    moved, step = atoms.positions.copy(), 1e-5
    moved[0, 0] += step
    pairs = [np.linalg.norm(moved[i] - moved[j]) for i in range(len(atoms)) for j in range(i)]
    slope = (sum((r - 1) ** 2 for r in pairs) - atoms.get_potential_energy()) / step
    assert slope == pytest.approx(-atoms.get_forces()[0, 0], abs=1e-3)
