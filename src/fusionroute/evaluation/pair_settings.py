"""What `fusionroute pairs` makes pairs of, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusionroute.errors import UsageError
from fusionroute.evaluation.execution import require_isolation
from fusionroute.evaluation.problems import ROWS


@dataclass(frozen=True)
class PairSettings:
    """What to make pairs of, and how.

    Attributes:
        out: the file of pairs; `NAME.samples.jsonl` beside it keeps answers and verdicts.
        solutions: a file for right answers too, references that stand in included, as chat rows for an expert.
        data: folder with the files of `ROWS`, and the test files that nothing may share text with.
        tasks: of `ROWS`.
        rows: fields of `DataSpec` that replace those in `ROWS` for every task: `start`, `stop`, `shuffle_seed`.
        limit: rows of each task, the first from `start` on; None is all.
        samples: answers to each problem; 0, with `reference` and `solutions`, takes the references alone.
        most: pairs, and solutions, of one problem.
        all_rows: also problems that the recipes hold out, which are left out otherwise.
        reference: where no sample is right, the reference solution stands in, if the checker finds it right.
        expert: who answers, alone; None is the collection as it is.
        hint: the reference solution is shown to who answers, and not in what is written (rationalisation; Zelikman et
            al., STaR, arXiv 2203.14465).
        draws: of instructions for each request of `ifeval`, with seeds from `seed` on; each is a problem of its own.
        edit: `ifeval` asks without the instructions, briefly, and answers are edited to follow these.
        seed: an answer's own seed is drawn from it, the prompt and the answer's number; so are ifeval's instructions.
        batch: answers written together.
        unsafe: run model-written code where nothing isolates it.
    """

    collection: Path
    out: Path
    data: Path
    tasks: Sequence[str] = ("gsm8k", "mbpp")
    rows: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    samples: int = 4
    most: int = 1
    all_rows: bool = False
    reference: bool = False
    expert: str | None = None
    hint: bool = False
    draws: int = 1
    edit: bool = False
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 400
    batch: int = 32
    dtype: str | None = None
    base: str | None = None
    unsafe: bool = False
    solutions: Path | None = None

    @property
    def samples_file(self) -> Path:
        """Where answers and verdicts are kept."""
        return self.out.with_suffix(".samples.jsonl")

    def sampling(self) -> dict[str, Any]:
        """What an answer depends on beside weights, prompt and seed."""
        names = ["temperature", "top_p", "max_new_tokens", "dtype"]
        names += [name for name in ("hint", "edit") if getattr(self, name)]
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: an unknown task or an impossible setting; nothing isolates model-written code.
        """
        from fusionroute.decoding.sampling import Sampling

        unknown = [task for task in self.tasks if task not in ROWS]
        if unknown or not self.tasks:
            raise UsageError(
                f"no pairs of {', '.join(unknown) or 'nothing'}: answers can be checked of {', '.join(ROWS)}"
            )
        for name in ("limit", "samples", "most", "draws", "max_new_tokens", "batch"):
            least = 0 if name == "samples" else 1
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
        if self.samples < 1 and not (self.reference and self.solutions is not None):
            raise UsageError(f"samples {self.samples} takes references alone: add --reference and --solutions FILE")
        if self.samples < 1 and (self.edit or self.hint):
            raise UsageError(f"samples {self.samples} asks nobody: drop --edit and --hint")
        for option, path in (("--out", self.out), ("--solutions", self.solutions)):
            if path is not None and path.is_dir():
                raise UsageError(f"{option} {path} is a folder: name a file, such as {path / 'pairs.jsonl'}")
        ours = {path.resolve() for path in (self.out, self.samples_file)}
        if self.solutions is not None and self.solutions.resolve() in ours:
            raise UsageError(f"--solutions {self.solutions} holds the pairs or their answers: name another file")
        Sampling(self.temperature, top_p=self.top_p)
        if self.temperature == 0:
            raise UsageError("temperature must be above 0: greedy answers are all the same")
        if self.hint and "ifeval" in self.tasks:
            raise UsageError("ifeval's references are edited by rule, nothing to hint at: leave it out, or --hint")
        if self.hint and self.reference and self.solutions is not None:
            raise UsageError(
                "hinted answers that copy the reference are no solutions, nor is the reference: drop it or --hint"
            )
        if self.edit and (others := [task for task in self.tasks if task != "ifeval"]):
            raise UsageError(
                f"answers to {', '.join(others)} cannot be edited to be right: --tasks ifeval alone, or no --edit"
            )
        if self.draws > 1 and "ifeval" not in self.tasks:
            raise UsageError(f"--draws {self.draws} is for ifeval's instructions: add ifeval to --tasks, or drop it")
        if "mbpp" in self.tasks:
            require_isolation(self.unsafe)
