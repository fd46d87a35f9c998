"""`melt-serve bench speculation`: the bundled checkpoints with drafts of tokens, and without, turn by turn."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Literal, get_args

from tqdm import tqdm

from melt_serve.bench.accuracy import BUNDLED, ENGINE, config_of
from melt_serve.bench.engine import BenchError, Engine
from melt_serve.bench.options import flag
from melt_serve.bench.report import judged, spread
from melt_serve.bench.shapes import MODELS, Model
from melt_serve.terminal import columns, loop_list, positive, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = "tokens a second with drafts of tokens and without"
DESCRIPTION = """\
Ask held-out questions of the bundled checkpoints, the MELT in chunk mode: without drafts, with those of n-grams, and
with those of the first loops, each on an engine of its own, in turn. Shown are tokens a second, the share of drafts
that were accepted, and the speed relative to none in the same round."""
EXAMPLES = """\
examples:
  melt-serve bench speculation
      1, 4 and 16 requests at a time; takes ten minutes or so on 2 quiet CPU cores
  melt-serve bench speculation --models looplm --draft-tokens 2 --draft-loops 2 --json
      one model, fewer and deeper drafts, and one line of JSON at the end"""

Drafts = Literal["none", "ngram", "depth"]
DRAFTS: tuple[Drafts, ...] = get_args(Drafts)

SHARE_OF_BOUND = 0.85
"""Of the arithmetic bound, which drafts by depth should reach at one request."""
LEAST_IN_A_CROWD = 0.95
"""Of the speed without drafts, at 16 requests."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: Sequence[Model] = flag(MODELS, "melt, looplm or both", words_of(*MODELS), "MODEL,MODEL")
    requests: Sequence[int] = flag((1, 4, 16), "requests at a time", loop_list, "N,N")
    draft_tokens: int = flag(3, "drafts that are verified together", positive, "N")
    draft_loops: int = flag(1, "loops by which depth drafts", positive, "K")
    questions: int = flag(32, "asked in every round", positive, "N")
    rounds: int = flag(3, "how often each engine answers them", positive, "N")


@dataclass(frozen=True)
class Result:
    """One model, kind of drafts, and number of requests at a time.

    Attributes:
        tokens_per_second: generated, the median round.
        ms_per_token: of one request, from one token to the next, on average.
        ratios: the speed over that without drafts, in each round.
        accepted: the share of drafts; None without any.
        bound: what loops alone would allow at this acceptance; None for n-grams, which cost none.
        goal: for the median ratio.
    """

    model: Model
    drafts: Drafts
    requests: int
    tokens_per_second: float
    ms_per_token: float
    ratios: Sequence[float]
    accepted: float | None
    bound: float | None
    goal: float | None

    @property
    def ratio(self) -> float:
        """The median over the rounds of the speed over that without drafts."""
        return median(self.ratios)


@dataclass(frozen=True)
class Round:
    """What an engine did: seconds, generated tokens, and of its drafts how often, how many, and how many accepted."""

    seconds: float
    tokens: int
    steps: int
    drafted: int
    accepted: int


def measure(options: Options) -> list[Result]:
    """Ask all engines of a model in every round.

    Raises:
        BenchError: drafts of so many loops are none, or an engine failed.
    """
    for model in options.models:
        if options.draft_loops >= (loops := config_of(model).total_ut_steps):
            raise BenchError(f"--draft-loops={options.draft_loops} must be below the {loops} loops of the {model}")
    results = []
    with tqdm(total=len(options.models) * options.rounds, unit="round", disable=None) as progress:
        for model in options.models:
            progress.set_description(model)
            done: dict[tuple[Drafts, int], list[Round]] = {
                each: [] for each in product(DRAFTS, sorted(set(options.requests)))
            }
            with engines_of(options, model) as engines:
                for number in range(options.rounds):
                    # Who goes first changes, so that a machine that slows down favours nobody.
                    for drafts, requests in list(done)[:: 1 if number % 2 else -1]:
                        asked = {"first": number * options.questions, "questions": options.questions}
                        facts = engines[drafts].ask("answer_in_crowds", requests=requests, **asked)
                        done[drafts, requests].append(Round(**facts))
                    progress.update()
            results += [result_of(options, model, *each, done) for each in done]
    return results


@contextmanager
def engines_of(options: Options, model: Model) -> Iterator[dict[Drafts, Engine]]:
    """Start an engine for each kind of drafts and warm it up. Between questions an engine sleeps."""
    with ExitStack() as stack:
        engines = {
            drafts: stack.enter_context(Engine(f"{model}, {drafts}", BUNDLED[model], arguments(options, model, drafts)))
            for drafts in DRAFTS
        }
        for engine in engines.values():
            engine.answer()
            engine.ask("answer_in_crowds", requests=1, first=0, questions=1)
        yield engines


def arguments(options: Options, model: Model, drafts: Drafts) -> dict[str, object]:
    """Return vLLM's arguments for one engine."""
    from melt_serve.engine.depth_drafts import DRAFTER

    by_drafts: dict[Drafts, dict[str, object]] = {
        "none": {},
        "ngram": {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 4}},
        "depth": {
            "speculative_config": {"model": DRAFTER},
            "additional_config": {"draft_loops": options.draft_loops},
        },
    }
    chosen = by_drafts[drafts]
    if isinstance(config := chosen.get("speculative_config"), dict):
        config["num_speculative_tokens"] = options.draft_tokens
    modes = {"hf_overrides": {"decode_mode": "chunk"}} if model == "melt" else {}
    return {**ENGINE, "max_num_seqs": max(options.requests), "disable_log_stats": False, **modes, **chosen}


def result_of(
    options: Options, model: Model, drafts: Drafts, requests: int, done: dict[tuple[Drafts, int], list[Round]]
) -> Result:
    """Gather the rounds of one kind of drafts and number of requests, beside those without drafts."""
    rounds, plain = done[drafts, requests], done["none", requests]
    speeds = [each.tokens / each.seconds for each in rounds]
    ratios = [speed * each.seconds / each.tokens for speed, each in zip(speeds, plain, strict=True)]
    drafted, accepted = sum(each.drafted for each in rounds), sum(each.accepted for each in rounds)
    bound = goal = None
    if drafts == "depth" and drafted:
        loops, steps = config_of(model).total_ut_steps, sum(each.steps for each in rounds)
        # In units of loops of one token: so many tokens would have taken T each, and took T and k for each draft.
        bound = loops * (steps + accepted) / (steps * loops + drafted * options.draft_loops)
        goal = SHARE_OF_BOUND * bound if requests == 1 else None
    if drafts != "none" and requests >= 16:
        goal = LEAST_IN_A_CROWD
    return Result(
        model=model,
        drafts=drafts,
        requests=requests,
        tokens_per_second=median(speeds),
        ms_per_token=1000 * requests / median(speeds),
        ratios=ratios,
        accepted=accepted / drafted if drafted else None,
        bound=bound,
        goal=goal,
    )


def table(results: Sequence[Result]) -> str:
    """Show the results in columns."""
    lines: list[tuple[str, ...]] = [
        ("model", "requests", "drafts", "accepted", "tok/s", "ms a token", "of none", "min", "max", "bound", "goal")
    ]
    for each in sorted(results, key=lambda each: (each.model, each.requests, DRAFTS.index(each.drafts))):
        lines.append(
            (
                each.model,
                str(each.requests),
                each.drafts,
                "-" if each.accepted is None else f"{each.accepted:.0%}",
                f"{each.tokens_per_second:.1f}",
                f"{each.ms_per_token:.1f}",
                *spread(each.ratios),
                "-" if each.bound is None else f"{each.bound:.2f}",
                judged(each.goal, each.ratio),
            )
        )
    return columns(lines)


def figure(results: Sequence[Result]) -> "Figure":
    """Draw the speed over that without drafts, by requests at a time; a line for each model and kind of drafts."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    axes.set(title="tokens a second, of those without drafts", xlabel="requests at a time")
    for model, drafts in dict.fromkeys((each.model, each.drafts) for each in results if each.drafts != "none"):
        points = [each for each in results if (each.model, each.drafts) == (model, drafts)]
        label = f"{model}, {drafts}"
        axes.plot([each.requests for each in points], [each.ratio for each in points], "o-", label=label)
    axes.axhline(1, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn
