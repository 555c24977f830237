"""The stages by kind; a new stage is one file here and one line below."""

from stages.base import Stage
from stages.clean import Clean
from stages.pretrain import Pretrain
from stages.tokenize import Tokenize
from stages.tokenizer import Tokenizer

STAGES: dict[str, type[Stage]] = {
    "clean": Clean,
    "tokenizer": Tokenizer,
    "tokenize": Tokenize,
    "pretrain": Pretrain,
}
