"""The stages by kind; a new stage is one file here and one line below."""

from stages.base import Stage
from stages.clean import Clean
from stages.dpo import Dpo
from stages.evaluate import Evaluate
from stages.export import Export
from stages.facts import Facts
from stages.grpo import GRPO
from stages.messages import Messages
from stages.preferences import Preferences
from stages.pretrain import Pretrain
from stages.problems import Problems
from stages.profile import Profile
from stages.qlora import QLoRA
from stages.sft import SFT
from stages.stream import Stream
from stages.tasks import Tasks
from stages.tokenize import Tokenize
from stages.tokenizer import Tokenizer

STAGES: dict[str, type[Stage]] = {
    "clean": Clean,
    "tokenizer": Tokenizer,
    "tokenize": Tokenize,
    "profile": Profile,
    "stream": Stream,
    "pretrain": Pretrain,
    "messages": Messages,
    "sft": SFT,
    "qlora": QLoRA,
    "facts": Facts,
    "tasks": Tasks,
    "problems": Problems,
    "grpo": GRPO,
    "evaluate": Evaluate,
    "preferences": Preferences,
    "dpo": Dpo,
    "export": Export,
}
