"""What a campaign begins with before there is a potential: structures chosen from a pool, and generated ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import ValidationError
from tiny_campaign import Killed, KillingProgress, result_of, run_or_resume, tiny_config

from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.choice import ExplorationInputs
from almlip_jax.campaign.generated import sane
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.preparation import planned_calls
from almlip_jax.campaign.round import Round
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import InitialSettings
from almlip_jax.campaign.sparse import SparseSettings
from almlip_jax.errors import InputError
from almlip_jax.features import described
from almlip_jax.files import read_json, write_json
from almlip_jax.generation import RandomSearchSettings
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.likeness import Likeness

STRETCHED = (4, 11, 17)
"""Places in the pool of molecules that are unlike the others."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Molecules that hardly differ, but for three."""
    frames = [molecule("H2O") for _ in range(24)]
    for number, frame in enumerate(frames):
        frame.rattle(0.005, seed=number)
    for number, place in enumerate(STRETCHED):
        frames[place].positions[1 + number % 2] *= 1.3 + 0.2 * number
    path = tmp_path_factory.mktemp("pool") / "pool.extxyz"
    write_structures(path, frames)
    return path


def of_pool(pool: Path, asked: Any, **sections: Any) -> dict[str, Any]:
    return {
        "initial": {"rattle": None, "md": (), "from_pool": asked},
        "test": {"md": (), "from_pool": 6},
        "exploration": {"kind": "pool", "files": str(pool)},
        **sections,
    }


class TestFromPool:
    def test_the_first_structures_are_far_apart(self, pool: Path, tmp_path: Path) -> None:
        drawn = Inputs(tiny_config(tmp_path, **of_pool(pool, 4))).pool_split
        config = tiny_config(tmp_path, **of_pool(pool, {"count": 4}))
        chosen = Inputs(config).pool_split
        assert chosen.test == drawn.test, "whatever is chosen, the test set is the same"
        assert {place for place in STRETCHED if place not in drawn.test} <= set(chosen.initial)
        assert sorted([*chosen.test, *chosen.initial, *chosen.rest]) == list(range(24)) and len(chosen.initial) == 4
        by_atoms = {"count": 4, "selector": {"kind": "cover"}}
        covering = Inputs(tiny_config(tmp_path, **of_pool(pool, by_atoms))).pool_split
        assert {place for place in STRETCHED if place not in drawn.test} <= set(covering.initial)
        run = RunDirectory(tmp_path / "run")
        run.path.mkdir()
        write_json(run.initial_pool, {"places": [chosen.rest[0], chosen.rest[3]]})
        assert Inputs(config, run).pool_split.initial == (chosen.rest[0], chosen.rest[3]), "what was chosen once stays"

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_features_are_in_the_precision_of_the_campaign(
        self, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
    ) -> None:
        """Whatever jax is set to, as where a campaign is checked before it begins."""
        seen: list[str] = []

        def noted(*given: Any) -> Any:
            found = described(*given)
            seen.extend(str(rows.dtype) for rows in found.features.values())
            return found

        monkeypatch.setattr("almlip_jax.campaign.sparse.described", noted)
        for double in (False, True):
            with jax.enable_x64(double):
                config = tiny_config(tmp_path, precision=precision, **of_pool(pool, {"count": 4}))
                assert len(Inputs(config).pool_split.initial) == 4
        assert seen == [precision, precision]

    def test_structures_that_are_labelled_already_count(self, pool: Path, tmp_path: Path) -> None:
        known = read_structures(pool)[STRETCHED[2]]
        known.info["REF_energy"] = 0.0
        known.arrays["REF_forces"] = np.zeros((3, 3))
        write_structures(tmp_path / "known.extxyz", [known])
        sections = of_pool(pool, {"count": 1}, test={"md": ()})
        sections["initial"]["dataset"] = str(tmp_path / "known.extxyz")
        assert Inputs(tiny_config(tmp_path, **sections)).pool_split.initial[0] != STRETCHED[2]

    @pytest.mark.parametrize(
        ("selector", "message"),
        [
            ({"kind": "top_k"}, "'top_k' looks at force_std_mean, but before the first label nothing is known"),
            ({"kind": "bait"}, "'bait' looks at last_layer_gradient, which needs a potential; .*power_spectrum"),
            ({"kind": "cover", "features": "latent"}, "'cover' looks at latent, which needs a potential"),
            ({"kind": "hybrid", "features": "power_spectrum"}, "'hybrid' looks at force_std_mean"),
        ],
    )
    def test_selectors_that_need_a_potential_are_refused(self, selector: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            InitialSettings.model_validate({"from_pool": {"count": 5, "selector": selector}})

    def test_keys_that_nothing_has_are_refused_before_anything_is_paid(self, pool: Path, tmp_path: Path) -> None:
        by_kind = {"kind": "stratified", "by": "kind", "selector": {"kind": "max_dist", "features": "power_spectrum"}}
        frames = read_structures(pool)
        for number, frame in enumerate(frames):
            frame.info |= {"kind": "stretched" if number in STRETCHED else "plain", "place": float(number)}
        write_structures(tmp_path / "named.extxyz", frames)
        named, asked = tmp_path / "named.extxyz", {"count": 4, "selector": by_kind}
        taught = {"source": {"kind": "tblite", "method": "GFN1-xTB"}, "frames": 40}
        first = {"from_teacher": {"count": 4, "selector": {**by_kind, "selector": {"kind": "bait"}}}}
        strained = {"generated": [{"kind": "rattled", "count": 9}], "from_generated": asked}
        for sections, why in (
            (of_pool(pool, asked), r"initial\.from_pool\.selector: no candidate has 'kind'"),
            (of_pool(pool, asked, teacher=taught), r"initial\.from_pool\.selector: no candidate has 'kind'"),
            (of_pool(pool, 4, selection={"selector": by_kind}), r"selection\.selector: no structure of the pool has"),
            (of_pool(named, {**asked, "selector": {**by_kind, "shares": {"odd": 1}}}), r"shares name odd, but"),
            (of_pool(named, {**asked, "selector": {**by_kind, "edges": [3]}}), r"which is not a number"),
            (
                {"teacher": taught, "initial": {"rattle": None, "md": (), **first}},
                r"no frame of a teacher has 'kind'.*have bath_temperature, charge, origin, spin, step",
            ),
            ({"initial": {"rattle": None, "md": (), **strained}}, r"initial\.from_generated\.selector: no candidate"),
        ):
            with pytest.raises(InputError, match=why):
                check_campaign(tiny_config(tmp_path, **sections))
        for key in ("bath_temperature", "origin"):
            sections = of_pool(named, asked, teacher=taught, selection={"selector": by_kind})
            first["from_teacher"]["selector"]["by"] = key
            sections["initial"] |= first
            check_campaign(tiny_config(tmp_path, **sections))

    def test_its_calls_are_planned_for(self, pool: Path, tmp_path: Path) -> None:
        given = InitialSettings(from_pool=SparseSettings(count=7))
        assert planned_calls(given, ()) == 7 == planned_calls(InitialSettings(from_pool=7), ())
        sections = of_pool(pool, {"count": 9}, stopping={"max_labels": 8}, oracle={"kind": "file", "path": str(pool)})
        with pytest.raises(InputError, match="the initial set needs 9 label-source calls"):
            check_campaign(tiny_config(tmp_path, **sections))


class TestGenerated:
    def made(self, folder: Path, **sections: Any) -> Any:
        write_structures(folder / "water.extxyz", [bulk("NaCl", "rocksalt", a=5.64)])
        return tiny_config(folder, **{"test": {"md": ()}, "exploration": {"kind": "generated", "of": []}, **sections})

    def test_the_same_seed_makes_the_same_and_sparse_ones_are_among_them(self, tmp_path: Path) -> None:
        both = [{"kind": "strained", "count": 5}, {"kind": "random_search", "count": 7, "units": [1, 2]}]
        initial = {"rattle": None, "md": (), "generated": both}
        exploration = {"kind": "generated", "of": both[:1]}
        config = self.made(tmp_path, initial=initial, exploration=exploration)
        one, same = Inputs(config).generated_to_label, Inputs(config).generated_to_label
        assert {kind: len(frames) for kind, frames in one.items()} == {"strained": 5, "random_search": 7}
        assert all(np.array_equal(a.positions, b.positions) for k in one for a, b in zip(one[k], same[k], strict=True))
        assert all(frame.info == {"charge": 0, "spin": 1} for frames in one.values() for frame in frames)
        few = self.made(tmp_path, initial=initial | {"from_generated": {"count": 4}}, exploration=exploration)
        kept = Inputs(few).generated_to_label
        everything = {frame.positions.tobytes() for frames in one.values() for frame in frames}
        assert sum(len(frames) for frames in kept.values()) == 4 == planned_calls(few.initial, ())
        assert {frame.positions.tobytes() for frames in kept.values() for frame in frames} <= everything

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            (
                {"exploration": [{"kind": "random_search", "composition": {"K": 1}, "volume": [20, 30]}]},
                "with K, which",
            ),
            ({"exploration": [{"kind": "surfaces", "layers": 60, "repeat": [2, 1]}]}, "more than largest 200"),
            ({"initial": {"generated": [{"kind": "vacancies", "missing": 9}]}}, "'vacancies' .* too few for missing 9"),
        ],
    )
    def test_what_cannot_be_made_is_refused_before_a_label(
        self, tmp_path: Path, sections: dict[str, Any], message: str
    ) -> None:
        of = sections.get("exploration", [{"kind": "strained"}])
        initial = {"rattle": {"count": 2}, "md": (), **sections.get("initial", {})}
        with pytest.raises(InputError, match=message):
            check_campaign(self.made(tmp_path, initial=initial, exploration={"kind": "generated", "of": of}))

    def test_random_crystals_need_no_start_geometry(self, tmp_path: Path) -> None:
        one = {"kind": "random_search", "count": 3, "composition": {"Si": 2}, "volume": [15, 25]}
        config = self.made(
            tmp_path,
            initial={"rattle": None, "md": (), "generated": [one]},
            exploration={"kind": "generated", "of": [one]},
        )
        config = config.model_copy(update={"system": config.system.model_copy(update={"structures": ()})})
        check_campaign(config)
        assert Inputs(config).species.symbols == ("Si",)
        with pytest.raises(InputError, match="'strained' changes start geometries, and system.structures names none"):
            strained = self.made(
                tmp_path,
                initial={"rattle": None, "md": (), "generated": [{"kind": "strained"}]},
                exploration={"kind": "generated", "of": [one]},
            )
            check_campaign(strained.model_copy(update={"system": config.system}))

    @pytest.mark.parametrize(
        ("oracle", "odd"), [({"kind": "tblite"}, 2), ({"kind": "ase", "calculator": "ase.calculators.emt:EMT"}, 1)]
    )
    def test_a_multiplicity_is_changed_where_the_label_source_asks_for_it(
        self, tmp_path: Path, oracle: dict[str, Any], odd: int
    ) -> None:
        made = [{"kind": "vacancies", "count": 6, "repeat": [2, 1, 1], "missing": 2, "species": ["Na"]}]
        config = self.made(
            tmp_path,
            oracle=oracle,
            initial={"rattle": None, "md": (), "generated": made},
            exploration={"kind": "generated", "of": made},
        )
        frames = [made.frame for made in Inputs(config).generated]
        assert {len(frame) for frame in frames} == {2, 3}
        spins = {len(frame): frame.info["spin"] for frame in frames}
        assert spins == {3: odd, 2: 1}, "a sodium atom has an odd number of electrons"

    def test_relaxations_that_explode_or_collapse_are_left_out(self) -> None:
        one, before = RandomSearchSettings(closest=0.5), bulk("NaCl", "rocksalt", a=5.64)
        for factor, kept in ((1.0, True), (1.25, True), (1.27, False), (0.8, True), (0.78, False)):
            after = before.copy()
            after.set_cell(before.cell * factor, scale_atoms=True)
            assert sane(before, after, one) == kept
        near = before.copy()
        near.positions[1] = near.positions[0] + [0, 0, 1.0]
        assert not sane(before, near, one)

    def test_no_candidate_is_a_test_structure_in_other_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        of = [{"kind": "rattled", "count": 4}]
        config = self.made(tmp_path, exploration={"kind": "generated", "of": of})
        here = Round(RunDirectory(tmp_path / "run").create(), 0, "", 1, SilentProgress())
        monkeypatch.setattr(Round, "dataset", lambda self: [])
        potential = SimpleNamespace(check_elements=lambda *_: None, ensemble=SimpleNamespace(sees_state=False))
        found = list[Any]()
        monkeypatch.setattr("almlip_jax.campaign.generated.offer", lambda here, frames, trained: found.append(frames))
        trained: Any = SimpleNamespace(potential=potential)
        nothing: Any = None
        given = ExplorationInputs(here, trained, Inputs(config), frozenset(), nothing, nothing)
        config.exploration.stage(given)
        same = found[0][2][::-1]
        same.positions += [1.0, -2.0, 0.5]
        config.exploration.stage(replace(given, held_out=Likeness([same])))
        kept = [[frame.positions.tobytes() for frame in frames] for frames in found]
        assert len(kept[0]) == 4 and kept[1] == [*kept[0][:2], kept[0][3]]

    def test_more_than_are_made_cannot_be_kept(self) -> None:
        with pytest.raises(ValidationError, match="from_generated takes 30 structures of fewer"):
            InitialSettings.model_validate(
                {"generated": [{"kind": "rattled", "count": 20}], "from_generated": {"count": 30}}
            )


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
def test_a_campaign_generates_relaxes_and_selects(tmp_path: Path) -> None:
    """Random crystals are relaxed without a label; a round that is killed in between and done again gives the same."""
    crystals = {"kind": "random_search", "composition": {"H": 2, "O": 1}, "volume": [9, 14], "count": 3}
    sections: dict[str, Any] = {
        "initial": {
            "rattle": None,
            "md": (),
            "generated": [{"kind": "rattled", "count": 6}, crystals | {"count": 2}],
        },
        "exploration": {
            "kind": "generated",
            "of": [{"kind": "rattled", "count": 4, "stdev": 0.1}, crystals | {"relax": {"cell": "full", "steps": 20}}],
        },
        "selection": {"selector": {"kind": "cover"}},
    }
    outcome = run_or_resume(tmp_path, tmp_path / "run", **sections)
    assert outcome.rule == "max_rounds" and outcome.labels == 8 + 6
    run = RunDirectory(tmp_path / "run")
    origins = [frame.info["origin"] for frame in read_structures(run.round(2).dataset)]
    assert origins == ["rattled"] * 6 + ["random_search"] * 2 + ["exploration"] * 6
    for number in range(2):
        pool = read_structures(run.round(number).pool)
        assert sum(not frame.pbc.any() for frame in pool) == 4 and 4 < len(pool) <= 7
    with pytest.raises(Killed):
        run_or_resume(tmp_path, tmp_path / "killed", KillingProgress(1, "relax", within=True), **sections)
    run_or_resume(tmp_path, tmp_path / "killed", **sections)
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
def test_a_campaign_begins_with_what_a_selector_chose(pool: Path, tmp_path: Path) -> None:
    """Killed while it labels the first set or after it, it ends as one that was not, by what it noted."""
    frames = read_structures(pool)
    for frame in frames:
        bonds = frame.positions[1:] - frame.positions[0]
        pull = 30 * (1 - 0.97 / np.linalg.norm(bonds, axis=1))[:, None] * bonds
        energy = 15 * float(np.sum((np.linalg.norm(bonds, axis=1) - 0.97) ** 2))
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=np.vstack([pull.sum(axis=0), -pull]))
    write_structures(tmp_path / "labelled.extxyz", frames)
    oracle = {"kind": "file", "path": str(tmp_path / "labelled.extxyz")}
    selection = {"batch": 3, "selector": {"kind": "environment_entropy", "features": "latent"}}
    sections = of_pool(pool, {"count": 8}, oracle=oracle, selection=selection)
    run_or_resume(tmp_path, tmp_path / "run", **sections)
    run = RunDirectory(tmp_path / "run")
    places = read_json(run.initial_pool)["places"]
    first = [frame.positions.tobytes() for frame in read_structures(run.round(0).dataset)]
    assert first == [frames[place].positions.tobytes() for place in places] and len(places) == 8
    for place in ((None, "initial set"), (1, "select")):
        folder = tmp_path / f"killed-{place[0]}"
        with pytest.raises(Killed):
            run_or_resume(tmp_path, folder, KillingProgress(*place, within=place[0] is None), **sections)
        run_or_resume(tmp_path, folder, **sections)
        assert result_of(folder) == result_of(tmp_path / "run")
