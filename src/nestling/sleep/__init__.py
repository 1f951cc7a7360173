"""Sleep: what the fast levels learned awake goes to slower ones, by distillation on the model's own dreams."""

from .budget import affordable, night_tokens
from .divergence import divergence
from .dreaming import DreamConfig, DreamReport, Task, dream_of
from .dreams import Dreams, Source, any_token, dream, mixture, own_samples, prefixes, self_study
from .grow import activate, draws, first_free, used
from .imitation import Heard, Meaning, as_likely, edit_distance, imitation, judged, likeness, nothing
from .night import SleepConfig, sleep
from .prune import evict, importance, merge, merge_slots, prune_slots, refuse, within_budget
from .report import PairReport, Scores, SleepReport
from .reservoir import Reservoir, keep, no_reservoir, reservoir
from .schedule import Pair, Schedule, after, at_ticks, by_hand, due, nights, pairs, when_slots_fill, when_surprised
from .seed import Place, SeedConfig, Seeded, Views, distance, seed
from .student import Student, paper, reset
from .waking import Lived, begin, live
from .warm_start import reduced_rank, warm_start

__all__ = [
    "DreamConfig",
    "DreamReport",
    "Dreams",
    "Heard",
    "Lived",
    "Meaning",
    "Pair",
    "PairReport",
    "Place",
    "Reservoir",
    "Schedule",
    "Scores",
    "SeedConfig",
    "Seeded",
    "SleepConfig",
    "SleepReport",
    "Source",
    "Student",
    "Task",
    "Views",
    "activate",
    "affordable",
    "after",
    "any_token",
    "as_likely",
    "at_ticks",
    "begin",
    "by_hand",
    "distance",
    "divergence",
    "draws",
    "dream",
    "dream_of",
    "due",
    "edit_distance",
    "evict",
    "first_free",
    "imitation",
    "importance",
    "judged",
    "keep",
    "likeness",
    "live",
    "merge",
    "merge_slots",
    "mixture",
    "night_tokens",
    "nights",
    "no_reservoir",
    "nothing",
    "own_samples",
    "pairs",
    "paper",
    "prefixes",
    "prune_slots",
    "reduced_rank",
    "refuse",
    "reservoir",
    "reset",
    "seed",
    "self_study",
    "sleep",
    "used",
    "warm_start",
    "when_slots_fill",
    "when_surprised",
    "within_budget",
]
