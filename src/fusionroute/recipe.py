"""A recipe: one YAML file from a base to a finished collection, in stages that resume and are skipped when done.

base → experts → annotation → SFT → reference annotation → CDPO → collection → baselines and reward models → held-out
figures. A stage's folder has a note in `stages/` with the hash of all it depends on; the same hash means it is done.
`--tiny` runs every stage on random models and built-in rows in about a minute.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusionroute import sources, weights
from fusionroute.configuration import ROUTER, FusionRouteConfig, MemberSpec, absolute_source
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.files import read_json, staged_file, write_json
from fusionroute.sections import ExpertSection, PhaseSection, Recipe, load_recipe
from fusionroute.training import processes
from fusionroute.training.rows import DataSpec, load_counted

if TYPE_CHECKING:
    from fusionroute.members import LoadOptions
    from fusionroute.training.data import Item
    from fusionroute.training.overlap import BenchmarkIndex

COLLECTION = "collection"  # the folder of the finished one


class Run:
    """One execution of a recipe in a folder.

    Args:
        recipe: the recipe.
        out: run folder; stages, annotations and the collection live in it.
        data: folder that relative data paths start from.
        base: another place to have the recipe's base from, such as a folder where the recipe names a Hub id. The
            finished collection names the recipe's, with the digest of what was used.
    """

    def __init__(self, recipe: Recipe, out: Path, data: Path | None, base: str | None = None) -> None:
        self.recipe, self.out, self.data, self.other_base = recipe, out, data, base
        self._rows: dict[str, list[dict]] = {}

    @property
    def base(self) -> tuple[str, str | None]:
        """Where the base is had from: its source and revision."""
        if self.other_base is not None:
            return self.other_base, None
        return self.recipe.base, self.recipe.revision

    # ---- stages

    def stage(self, name: str, inputs: Any, work: Callable[[Path], Any]) -> Path:
        """Run `work(folder)` unless `folder` already holds its result for the same `inputs`; returns the folder."""
        folder = self.out / name
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        # Beside the folder, not in it: a collection's folder is what gets pushed.
        marker = self.out / "stages" / f"{name.replace('/', '-')}.json"
        if folder.exists() and marker.is_file() and read_json(marker)["inputs"] == key:
            say(f"{name}: done before, skipped")
            return folder
        run = self.out / "checkpoints" / f"{name.replace('/', '-')}-{key[:12]}"
        say(f"{name}: started")
        marker.unlink(missing_ok=True)
        started = time.monotonic()
        result = work(run)
        seconds = time.monotonic() - started
        write_json(marker, {"inputs": key, "seconds": round(seconds, 1), "result": result})
        shutil.rmtree(run, ignore_errors=True)
        say(f"{name}: done in {seconds / 60:.1f} min")
        return folder

    def rows(self, specs: list[DataSpec], what: str) -> list[dict]:
        """The rows of `specs`, without those that share 13 words in a row with a benchmark's test item."""
        from fusionroute.training.overlap import drop_overlapping

        key = json.dumps([spec.model_dump() for spec in specs])
        if key not in self._rows:
            rows, ill_formed = [], 0
            for spec in specs:
                got, dropped = load_counted(spec, self.data)
                rows += got
                ill_formed += dropped
            kept, overlapping = drop_overlapping(rows, self.index)
            self._rows[key] = kept
            say(
                f"{what}: {len(kept)} rows; left out: {ill_formed} ill-formed, {len(overlapping)} that share 13 "
                "words in a row with a benchmark's test item"
            )
        return self._rows[key]

    @cached_property
    def index(self) -> "BenchmarkIndex":
        """The benchmarks' test items."""
        from fusionroute.training.overlap import BenchmarkIndex, benchmark_files

        if self.recipe.benchmarks is not None:
            files = [(self.data or Path()) / name for name in self.recipe.benchmarks]
        else:
            files = benchmark_files(self.data) if self.data is not None else []
            if not files:
                say("no benchmark test files under --data: the check for shared text has nothing to compare with")
        return BenchmarkIndex.from_files(files)

    # ---- the recipe

    def run(self) -> Path:
        """Every stage in order; returns the folder of the collection."""
        from fusionroute.recipe_baselines import check_baselines, run_baselines

        recipe = self.recipe
        source, revision = self.base
        say(f"base: {source}")
        digest = weights.digest(sources.resolve(source, revision=revision))
        check_baselines(self)
        experts = [self._expert(section, digest) for section in recipe.experts]
        untrained = self._assemble("collection-untrained", experts, None, {})
        sft = self._phase("sft", untrained, recipe.sft)
        after_sft = self._assemble("collection-sft", experts, sft, {"sft": recipe.sft.training})
        final = sft
        training: dict[str, Any] = {"sft": recipe.sft.training}
        if recipe.cdpo is not None:
            final = self._phase("cdpo", after_sft, recipe.cdpo)
            training["cdpo"] = recipe.cdpo.training
        training["data"] = [spec.model_dump(exclude_defaults=True) for spec in self._training_data()]
        collection = self._assemble(COLLECTION, experts, final, training)
        run_baselines(self, collection, sft)
        if recipe.heldout:
            self._heldout(collection)
        return collection

    def _training_data(self) -> list[DataSpec]:
        recipe = self.recipe
        specs = [spec for expert in recipe.experts for spec in expert.data] + recipe.sft.data
        return specs + (recipe.cdpo.data if recipe.cdpo is not None else [])

    def _options(self) -> "LoadOptions":
        import torch

        from fusionroute.members import LoadOptions

        return LoadOptions(dtype=getattr(torch, self.recipe.dtype))

    def _expert(self, section: ExpertSection, base_digest: str) -> MemberSpec:
        recipe = self.recipe
        if section.data:
            rows = self.rows(section.data, f"expert {section.name}")
            folder = self.out / "experts" / section.name
            settings = section.model_dump(exclude={"description"})
            inputs = [base_digest, digest_rows(rows), settings, recipe.dtype, recipe.max_length]
            self.stage(f"experts/{section.name}", inputs, lambda run: self._train_expert(section, rows, folder, run))
        return self._spec(section)

    def _spec(self, section: ExpertSection) -> MemberSpec:
        """An expert as a member; one with data has its adapter where it is trained."""
        source, revision = (section.source, section.revision) if section.source else self.base
        adapter = str(self.out / "experts" / section.name / "adapter") if section.data else section.adapter
        return MemberSpec(section.name, source, revision, adapter, description=section.description)

    @property
    def start(self) -> MemberSpec:
        """What the router is before its first phase."""
        section = self.recipe.router
        if section.start is not None:
            expert = next(expert for expert in self.recipe.experts if expert.name == section.start)
            return replace(self._spec(expert), name=ROUTER, description="")
        source, revision = (section.source, section.revision) if section.source else self.base
        return MemberSpec(ROUTER, source, revision)

    def _train_expert(self, section: ExpertSection, rows: list[dict], folder: Path, run: Path) -> None:
        import torch

        from fusionroute.training.experts import train_expert

        arguments = {"max_length": self.recipe.max_length, **section.training}
        source, revision = self.base
        train_expert(
            source,
            rows,
            folder / "adapter",
            name=section.name,
            lora=section.lora,
            arguments=arguments,
            run=run,
            dtype=getattr(torch, self.recipe.dtype),
            revision=revision,
        )

    def _assemble(self, name: str, experts: list[MemberSpec], phase: Path | None, training: dict[str, Any]) -> Path:
        from fusionroute.collection import assemble
        from fusionroute.training.phases import router_spec

        router = self.start if phase is None else router_spec(self.start, phase / "router")
        head = None if phase is None else phase / "router"
        inputs = [
            [[e.name, e.source, e.revision, *_digests(e), e.description] for e in experts],
            [router.source, *_digests(router), None if head is None else _head_digest(head)],
            training,
            self.recipe.alpha,
            [self.recipe.base, self.recipe.revision],
        ]

        def work(_run: Path) -> None:
            folder = self.out / name
            shutil.rmtree(folder, ignore_errors=True)
            whole = [router.name] if router.adapter is None and phase is not None else []
            # What is only a step on the way must find its members here.
            published = {self.base[0]: (self.recipe.base, self.recipe.revision)} if name == COLLECTION else None
            assemble(
                folder,
                router,
                experts,
                head=head,
                embed=whole,
                alpha=self.recipe.alpha,
                training=training or None,
                published=published,
            )

        return self.stage(name, inputs, work)

    def items(self, specs: list[DataSpec], what: str, collection: Path) -> "tuple[FusionRouteConfig, list[Item]]":
        """The configuration of `collection`, and the rows of `specs` as its tokenizer renders them, not annotated.

        Raises:
            FusionRouteError: as `tokenize_rows` and `find_rows`.
        """
        from fusionroute.collection import load_tokenizer, read_config
        from fusionroute.training.data import tokenize_rows

        config = read_config(collection)
        items, dropped = tokenize_rows(
            load_tokenizer(collection),
            self.rows(specs, what),
            context=config.max_position_embeddings,
            max_length=self.recipe.max_length,
        )
        say(f"{what}: {len(items)} items, {dropped} longer than {self.recipe.max_length} tokens left out")
        return config, items

    def _phase(self, name: Literal["sft", "cdpo"], collection: Path, section: PhaseSection) -> Path:
        from fusionroute.training import phases
        from fusionroute.training.annotation import sequences_of
        from fusionroute.training.data import digest_sequences

        config, items = self.items(section.data, f"router {name}", collection)
        lora = self.recipe.router.lora
        inputs = [
            [[s.digest, s.adapter_digest] for s in config.member_specs],
            _head_digest(collection / "router"),
            digest_sequences(sequences_of(items)),
            section.training,
            None if lora is None else lora.model_dump(),
            self.recipe.dtype,
        ]
        common: dict[str, Any] = {"arguments": section.training, "options": self._options()}
        out, annotations = self.out / name / "router", self.out / "annotations"
        if name == "sft":
            return self.stage(
                name,
                inputs,
                lambda run: phases.sft(config, collection, items, annotations, out, lora=lora, run=run, **common),
            )
        return self.stage(
            name, inputs, lambda run: phases.cdpo(config, collection, items, annotations, out, run=run, **common)
        )

    def _heldout(self, collection: Path) -> None:
        from fusionroute.collection import read_config, record_scores
        from fusionroute.training.heldout import scores

        def work(_run: Path) -> None:
            result, text = measure_heldout(self, collection, self.other_base)
            write_json(self.out / "heldout" / "routing.json", result)
            with staged_file(self.out / "heldout" / "routing.md") as scratch:
                scratch.write_text(text, encoding="utf-8")
            say(text)

        inputs = [
            _tree_digest(collection),
            digest_rows(self.rows(self.recipe.heldout, "held out")),
            self.recipe.max_length,
        ]
        folder = self.stage("heldout", inputs, work)
        # Not in `work`: a collection that was put together anew, with another description say, has no scores any more.
        found = scores(read_json(folder / "routing.json"))
        if (read_config(collection).training or {}).get("scores") != found:
            record_scores(collection, found)


def measure_heldout(run: Run, collection: Path, base: str | None = None) -> tuple[dict[str, Any], str]:
    """Routing figures of `collection` on the recipe's held-out rows: the JSON and its Markdown."""
    from fusionroute.modeling import FusionRouteForCausalLM
    from fusionroute.placement import best_device
    from fusionroute.progress import quiet
    from fusionroute.training import heldout

    _, items = run.items(run.recipe.heldout, "held out", collection)
    with quiet():
        model = FusionRouteForCausalLM.from_pretrained(
            collection, dtype=run.recipe.dtype, base=base, device=best_device()
        )
    result = heldout.measure(model, items)
    return result, heldout.render(result)


def digest_rows(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _digests(spec: MemberSpec) -> tuple[str, str | None]:
    """Of the member's weights as they are now, and of its adapter: a source may name a folder whose files change."""
    adapter = None if spec.adapter is None else weights.digest(sources.resolve(spec.adapter, what="adapter"))
    return weights.digest(sources.resolve(spec.source, revision=spec.revision)), adapter


def _head_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "route_head.safetensors").read_bytes()).hexdigest()


def _tree_digest(collection: Path) -> str:
    """What a collection computes: its members' digests, head and α."""
    config = read_json(collection / "config.json")
    members = [[m["digest"], m["adapter_digest"]] for m in [config["router"], *config["experts"]]]
    return json.dumps([members, config["alpha"], _head_digest(collection / "router")])


def say(text: str) -> None:
    if processes.is_main():
        print(text, file=sys.stderr, flush=True)


def execute(
    path: Path,
    out: Path | None,
    data: Path | None,
    *,
    tiny: bool = False,
    base: str | None = None,
    changes: Sequence[str] = (),
) -> Path:
    """Run the recipe at `path`; returns the collection's folder.

    Args:
        base: as in `Run`.
        changes: as in `load_recipe`.

    Raises:
        FusionRouteError: whatever a stage finds wrong; what is done stays done.
    """
    if processes.world() > 1:
        raise UsageError(
            f"`fusionroute run` is one process, and was launched as {processes.world()}: "
            "launch `fusionroute annotate` and `fusionroute train`, which share their work (docs/training.md)"
        )
    recipe = load_recipe(path, changes)
    out = out or Path("runs") / (f"{recipe.name}-tiny" if tiny else recipe.name)
    if data is not None and not data.is_dir():
        raise UsageError(f"--data {data} is no folder")
    if tiny:
        from fusionroute.tiny import shrink_recipe

        if base is not None:
            raise UsageError(f"--tiny makes a base of its own: drop --base {base}")
        recipe, data = shrink_recipe(recipe, out)
    try:
        return Run(recipe, out.resolve(), data, None if base is None else absolute_source(base)).run()
    except KeyboardInterrupt:
        raise FusionRouteError(f"interrupted; run the same command again to go on in {out}") from None
