"""One hybrid model definition, from training to rollouts to export. Knows nothing of data or stages."""


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know the architecture; imports torch, safe to call twice."""
    from model.lm import register as register_classes

    register_classes()
