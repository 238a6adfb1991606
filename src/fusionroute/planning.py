"""What a recipe would take, before anything is loaded or downloaded: stages, GPU-hours, memory, disk, downloads.

    fusionroute run RECIPE --plan

Every number follows from docs/scale.md's formulas, the dimensions of the models (`dimensions`) and the rows: read where
their files are at hand, assumed elsewhere. Knows no evaluation, and nothing of what a run has done already.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from fusionroute.baselines.carried import BASELINES
from fusionroute.dimensions import Dimensions, find_dimensions
from fusionroute.errors import UsageError
from fusionroute.sections import ExpertSection, Recipe, load_recipe
from fusionroute.training.annotation import BATCH_TOKENS
from fusionroute.training.logprobs import CHUNK
from fusionroute.training.lora import LoraSettings
from fusionroute.training.rows import DataSpec, load_counted

GPUS = {"A100": 312e12, "H100": 989e12}  # dense bfloat16 FLOP/s of the data sheets
MFU = 0.4  # share of a GPU's data-sheet FLOP/s that training and annotating get
# Mean tokens of a row whose file is not at hand: bytes of text in open-perfectblend and OpenHermesPreferences ÷ 4.
ROW_TOKENS, PAIR_TOKENS = 520, 850
CHARACTERS = 4  # a token, of rows that are at hand
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
ADAM = 16  # bytes a trained number takes: float32 weight, gradient and two moments
CHECKPOINT = 12  # of them in a checkpoint, of which two are kept while a third is written


@dataclass(frozen=True)
class Stage:
    """A part of a stage of `run`.

    Attributes:
        name: the stage, as `run` calls it.
        work: what is done in it.
        rows, tokens: that pass through a model, epochs counted.
        flops: of all of it.
        memory: bytes on a GPU that does it alone.
        shared: bytes on each of the GPUs that share it; as `memory` where one GPU is all that it can use.
        checkpoints: bytes of checkpoints on disk at most, while it runs.
        kept: bytes it leaves in the run folder.
    """

    name: str
    work: str
    rows: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    memory: float = 0.0
    shared: float = 0.0
    checkpoints: float = 0.0
    kept: float = 0.0


class Text(NamedTuple):
    """Rows of one kind: how many, and the tokens of all their sequences, of which a pair has two."""

    rows: int
    tokens: float
    paired: bool


Place = tuple[str, str | None]  # a source and its revision


class Planner:
    """A recipe's members, rows and stages as numbers.

    Attributes:
        data_sets: what is known of each entry of a data list met so far.
        models: dimensions of each model met so far, and where they are from.
        notes: for people.
    """

    def __init__(self, recipe: Recipe, data: Path | None, gpus: int) -> None:
        self.recipe, self.data, self.gpus = recipe, data, gpus
        self.size = SIZE[recipe.dtype]  # bytes of a weight
        self.notes: list[str] = []
        self.data_sets: list[dict[str, Any]] = []
        self.models: dict[Place, tuple[Dimensions, str]] = {}
        self._texts: dict[str, Text] = {}

    # ---- members

    def place(self, section: ExpertSection) -> Place:
        """Where an expert's model is from."""
        return (section.source, section.revision) if section.source else (self.recipe.base, self.recipe.revision)

    @property
    def start(self) -> ExpertSection | None:
        """The expert that the router begins as."""
        return next((e for e in self.recipe.experts if e.name == self.recipe.router.start), None)

    @property
    def router(self) -> Place:
        """Where the router's model is from."""
        section = self.recipe.router
        if self.start is not None:
            return self.place(self.start)
        return (section.source, section.revision) if section.source else (self.recipe.base, self.recipe.revision)

    @property
    def lora(self) -> LoraSettings | None:
        """The router's adapter: that of the expert it begins as, or a new one; None trains every weight."""
        start = self.start
        return start.lora if start is not None and (start.data or start.adapter) else self.recipe.router.lora

    @property
    def members(self) -> dict[str, Place]:
        """The router and the experts."""
        return {"router": self.router, **{expert.name: self.place(expert) for expert in self.recipe.experts}}

    def dimensions(self, place: Place) -> Dimensions:
        """Of the model at `place`."""
        if place not in self.models:
            self.models[place] = find_dimensions(*place)
        return self.models[place][0]

    # ---- rows

    def text(self, specs: list[DataSpec], *, paired: bool) -> Text:
        """Those of `specs` that are pairs, or that are not."""
        parts = [self._text(spec) for spec in specs if spec.paired == paired]
        return Text(sum(part.rows for part in parts), sum(part.tokens for part in parts), paired)

    def _text(self, spec: DataSpec) -> Text:
        key = spec.model_dump_json()
        if key not in self._texts:
            text, known = self._measure(spec)
            self._texts[key] = text
            entry = {"path": spec.path, "hub": spec.split is not None, "tokens_from": known}
            self.data_sets.append(entry | text._asdict())
        return self._texts[key]

    def _measure(self, spec: DataSpec) -> tuple[Text, str]:
        paired, path = spec.paired, Path(spec.path).expanduser()
        # As `find_rows` looks for it: without --data a relative path is nowhere.
        located = self.data is not None or path.is_absolute()
        if spec.split is None and located and ((self.data or Path()) / path).is_file():
            rows, _ = load_counted(spec, self.data)
            sides = [_sides(row) for row in rows]
            limit = self.recipe.max_length
            kept = [side for side in sides if limit is None or max(side) <= limit]
            return Text(len(kept), sum(sum(side) for side in kept), paired), "read"
        if spec.stop is None:
            self.notes.append(f"{spec.path}: how many rows is unknown while the file is not at hand; counted as none")
            return Text(0, 0.0, paired), "unknown"
        taken, longest = spec.stop - spec.start, (1 + paired) * (self.recipe.max_length or PAIR_TOKENS)
        return Text(taken, taken * min(PAIR_TOKENS if paired else ROW_TOKENS, longest), paired), "assumed"

    # ---- stages

    def stages(self) -> list[Stage]:
        """What `run` does, in its order."""
        recipe, found = self.recipe, list[Stage]()
        for expert in recipe.experts:
            if expert.data:
                texts = [self.text(expert.data, paired=False)]
                name = f"experts/{expert.name}"
                found.append(self._training(name, "training", texts, expert.training, self.place(expert), expert.lora))
        found.append(Stage("collection-untrained", "assembling"))
        kept = 0.0
        for name, phase in (("sft", recipe.sft), ("cdpo", recipe.cdpo)):
            if phase is not None:
                texts = [self.text(phase.data, paired=paired) for paired in (False, True)]
                found += self._annotation(name, texts, reference=name == "cdpo")
                found.append(self._training(name, "training", texts, phase.training, self.router, self.lora))
                kept = found[-1].kept
                if phase.training.get("route_loss") == "renormalized":
                    self.notes.append(f"{name}: route_loss renormalized runs every expert at each step, not counted")
            # A trained router is copied into the collection.
            found.append(Stage("collection-sft" if name == "sft" else "collection", "assembling", kept=kept))
        found += self._baselines()
        if recipe.heldout:
            found.append(self._heldout())
        return found

    def _annotation(self, name: str, texts: list[Text], *, reference: bool) -> list[Stage]:
        """A pass of each expert, one in memory at a time; in phase 2 of the router after phase 1 too."""
        tokens, rows, length = sum(t.tokens for t in texts), sum(t.rows for t in texts), _length(texts)
        members = self.members
        names = [expert.name for expert in self.recipe.experts] + (["router"] if reference else [])
        stages = []
        for member in names:
            size = self.dimensions(members[member])
            batch = max(self.recipe.max_length or 0, BATCH_TOKENS)
            memory = size.parameters * self.size + batch * size.layer_activations(ceil(length)) + _logits(size)
            flops = size.forward_flops(tokens, length)
            kept = tokens * (12 if member == "router" else 8)  # log-probability and id, of the router its route too
            stages.append(Stage(name, f"annotation by {member}", rows, tokens, flops, memory, memory, kept=kept))
        return stages

    def _training(
        self,
        name: str,
        work: str,
        texts: list[Text],
        training: dict[str, Any],
        place: Place,
        lora: LoraSettings | None,
        *,
        reference: bool = False,
    ) -> Stage:
        """Forward and backward; with a LoRA without the gradients of the base's weights.

        Args:
            training: transformers' arguments; what is absent is as transformers has it.
            reference: each step runs a reference model too (trl's DPO).
        """
        size, length = self.dimensions(place), _length(texts)
        rows, batch = sum(t.rows for t in texts), int(training.get("per_device_train_batch_size", 8))
        steps = int(training.get("max_steps", -1))
        epochs = float(training.get("num_train_epochs", 3))
        taken = steps * batch * int(training.get("gradient_accumulation_steps", 1)) if steps > 0 else rows * epochs
        tokens = sum(t.tokens for t in texts) / max(rows, 1) * taken
        checkpointing = bool(training.get("gradient_checkpointing") or training.get("activation_checkpointing"))
        products = 2 if training.get("bf16") else 4
        trained = size.parameters if lora is None else size.lora_parameters(lora)

        passes = (3 if lora is None else 2) + checkpointing + reference
        flops = passes * size.forward_flops(tokens, length) + (0 if lora is None else 6 * trained * tokens)

        longest = int(training.get("max_length") or self.recipe.max_length or ceil(2 * length))
        sequences = batch * (2 if any(t.paired and t.rows for t in texts) else 1)
        working = sequences * longest * size.activations(longest, checkpointing=checkpointing, size=products)
        alone = shared = ADAM * trained + working + _logits(size)
        if lora is None:
            # Autocast keeps a copy of every weight. Sharded, whole are embedding and head, and two layers: one in use,
            # one on its way; weights and gradients.
            alone += 2 * trained if products == 2 else 0
            gathered = 2 * products * (size.root_parameters + 2 * size.layer_parameters)
            shared += gathered - ADAM * trained * (1 - 1 / self.gpus)
        else:
            alone += size.parameters * self.size
            shared = alone  # the frozen base is whole on each
        return Stage(
            name, work, round(taken), tokens, flops, alone, shared,
            checkpoints=3 * CHECKPOINT * trained, kept=trained * self.size,
        )  # fmt: skip

    def _baselines(self) -> list[Stage]:
        recipe, found = self.recipe, list[Stage]()
        phases = [phase for phase in (recipe.sft, recipe.cdpo) if phase is not None]
        if recipe.finetuned is not None and self.lora is not None:
            data = [spec for phase in phases for spec in phase.data]
            chat, pairs = [self.text(data, paired=False)], [self.text(data, paired=True)]
            settings = recipe.sft.training | recipe.finetuned.training
            found.append(self._training("finetuned", "SFT", chat, settings, self.router, self.lora))
            if recipe.cdpo is not None:
                settings = recipe.cdpo.training | recipe.finetuned.dpo
                found.append(
                    self._training("finetuned", "DPO", pairs, settings, self.router, self.lora, reference=True)
                )
        for reward in recipe.rewards:
            texts, name = [self.text(reward.data, paired=True)], f"rewards/{reward.name}"
            found.append(self._training(name, "training", texts, reward.training, self.router, reward.lora))
        if self.lora is not None or recipe.rewards:
            found.append(Stage(f"collection/{BASELINES}", "copying"))
        return found

    def _heldout(self) -> Stage:
        """All members in memory, each over all tokens."""
        texts = [self.text(self.recipe.heldout, paired=paired) for paired in (False, True)]
        tokens, length = sum(t.tokens for t in texts), _length(texts)
        sizes = [self.dimensions(place) for place in self.members.values()]
        # A router trained whole is a model of its own; as an adapter it shares a base.
        whole = {self.place(expert) for expert in self.recipe.experts} | ({self.router} if self.lora else set())
        parameters = sum(self.dimensions(place).parameters for place in whole)
        parameters += 0 if self.lora else sizes[0].parameters
        working = BATCH_TOKENS * sizes[0].layer_activations(ceil(length)) + len(sizes) * _logits(sizes[0])
        memory = parameters * self.size + working
        flops = sum(size.forward_flops(tokens, length) for size in sizes)
        return Stage("heldout", "all members", sum(t.rows for t in texts), tokens, flops, memory, memory)


def _sides(row: dict[str, Any]) -> list[float]:
    """Tokens of a row's sequences, by their characters."""
    texts = [row["messages"]] if "messages" in row else [row["prompt"] + row[side] for side in ("chosen", "rejected")]
    return [sum(len(message["content"]) for message in text) / CHARACTERS for text in texts]


def _length(texts: list[Text]) -> float:
    """Mean tokens of a sequence."""
    sequences = sum(text.rows * (2 if text.paired else 1) for text in texts)
    return sum(text.tokens for text in texts) / max(sequences, 1)


def _logits(size: Dimensions) -> float:
    """Bytes of a chunk's logits, their float32 copy and its gradient."""
    return CHUNK * size.vocab * 12


def make_plan(recipe: Recipe, out: Path, data: Path | None = None, *, gpus: int = 8) -> dict[str, Any]:
    """All there is to say about running `recipe`, as a dict that `json.dumps` takes: bytes, FLOPs, hours.

    `problems` lists what would stop the run, one line each.

    Args:
        out: the run folder, whose disk is looked at.
        data: folder that relative data paths start from; rows that are there are read.
        gpus: that share the training of a whole router.

    Raises:
        UsageError: a source or Hub id is malformed.
        FusionRouteError: the size of a model cannot be known; a data file is damaged.
    """
    from fusionroute import planning_checks as checks

    checks.check_names(recipe)
    planner = Planner(recipe, data, gpus)
    stages = planner.stages()
    downloads = checks.downloads(planner)
    kept = sum(stage.kept for stage in stages)
    disk = checks.disk(out, downloads, kept + max(stage.checkpoints for stage in stages), kept)
    words = checks.vocabularies(planner.members)
    problems = [f"vocabulary: {words['error']}"] if "error" in words else []
    return {
        "recipe": recipe.name,
        "gpus": gpus,
        "assumed": {"mfu": MFU, "row_tokens": ROW_TOKENS, "pair_tokens": PAIR_TOKENS},
        "members": {name: list(place) for name, place in planner.members.items()},
        "models": [
            {"source": source, "revision": revision, "parameters": size.parameters, "from": where}
            for (source, revision), (size, where) in planner.models.items()
        ],
        "router_lora": None if planner.lora is None else planner.lora.model_dump(),
        "data": planner.data_sets,
        "stages": [
            asdict(stage) | {"hours": {name: stage.flops / (rate * MFU) / 3600 for name, rate in GPUS.items()}}
            for stage in stages
        ],
        "downloads": downloads,
        "disk": disk,
        "vocabulary": words,
        "notes": planner.notes + [f"{d['what']}: size unknown, not counted" for d in downloads if d["bytes"] is None],
        "problems": problems + checks.shortages(disk),
    }


def plan(
    path: Path,
    out: Path | None,
    data: Path | None,
    *,
    base: str | None = None,
    gpus: int = 8,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """The plan of the recipe at `path`; as `recipe.execute` takes its arguments, errors as `make_plan`."""
    recipe = load_recipe(path, changes)
    if data is not None and not data.is_dir():
        raise UsageError(f"--data {data} is no folder")
    if base is not None:
        recipe.base, recipe.revision = base, None
    return make_plan(recipe, out or Path("runs") / recipe.name, data, gpus=gpus)
