"""What a plan of QLoRA says, held against a run: the default recipe's base, trained parameters and checkpoint."""

import pytest

from pipelines.recipe import DEFAULT, load_recipe
from stages import STAGES
from stages.runtime.qlora_config import QuantisationConfig
from stages.runtime.qlora_plan import base_bytes, memory_of_trained, trained_parameters

# Of the default recipe's artifact: stage.json's metrics, and the bytes of the tensors in its checkpoint's two files.
BASE_BYTES = 6_371_596
TRAINED = 180_480
MODEL_STATES, OPTIMIZER_STATES = 5_103_901, 2_175_123
OUTPUT = 20_305_504 + 728_680


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(DEFAULT)


def planned(recipe, world_size=1, **changes):
    config = recipe.stages["qlora"].model_copy(update=changes)
    return STAGES["qlora"].plan(config, recipe.model, world_size)


def test_the_base_takes_half_a_byte_a_weight_with_its_scales_and_code_books(recipe):
    assert base_bytes(recipe.model, QuantisationConfig()) == pytest.approx(BASE_BYTES, rel=1e-5)
    plain = base_bytes(recipe.model, QuantisationConfig(double_quant=False))
    # 4,005,888 weights of 27 matrices in blocks of 64, a scale of four bytes each, sixteen levels a matrix.
    assert plain == 27 * 64 + 4_005_888 // 2 + 4 * 4_005_888 // 64 + 4 * (5_074_784 - 4_005_888)


def test_a_checkpoint_holds_the_adapters_and_their_moments_and_not_the_base(recipe):
    found = planned(recipe)
    assert found["checkpoint_bytes"] == pytest.approx(MODEL_STATES + OPTIMIZER_STATES, rel=0.02)
    assert found["disk_bytes"] == pytest.approx(3 * (MODEL_STATES + OPTIMIZER_STATES) + OUTPUT, rel=0.02)
    # Without ZeRO there is no second copy of what is trained.
    assert found["checkpoint_bytes"] - planned(recipe, deepspeed="zero0")["checkpoint_bytes"] == 4 * TRAINED


def test_only_the_adapters_have_gradients_and_moments(recipe):
    assert trained_parameters(recipe.model, recipe.stages["qlora"].adapter) == TRAINED
    assert memory_of_trained(TRAINED, 0, 1) == TRAINED * 16
    assert memory_of_trained(TRAINED, 2, 4) == TRAINED * 8 + TRAINED * 3
    full = STAGES["sft"].plan(recipe.stages["qlora"], recipe.model, 1)
    found = planned(recipe)
    # Weights and moments of all are 12 bytes a parameter; of base and adapters it is a fifth of that.
    assert full["memory_per_gpu_bytes"] - found["memory_per_gpu_bytes"] > 9 * 5_074_784
    # Two of three products, a forward one and one backwards by the inputs, and all three of the adapters.
    whole, tokens = full["training_flops"], found["tokens"]
    assert found["training_flops"] == pytest.approx(whole * 2 / 3 + tokens * 6 * TRAINED)


def test_modules_that_are_trained_whole_are_counted(recipe):
    adapter = recipe.stages["qlora"].adapter.model_copy(update={"modules_to_save": ["norm", "mlp_norm"]})
    # The last norm and a norm of each of five blocks, 256 wide; those of the mixers go by the mixer's other parameters.
    assert trained_parameters(recipe.model, adapter) > TRAINED + 6 * 256
