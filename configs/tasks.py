"""How `evaluate` and `sweep` run tasks of lm-evaluation-harness; a task without a row runs with `config.sampler`.

[authors] marks the settings of ELBO-KTO's own evaluation, [llada] those published for LLaDA-8B-Instruct
(arXiv 2502.09992; docs/method.md 6, 7), [llada 1.5] those of arXiv 2505.19223, [ours] what publications leave
open. `steps` is gen_length everywhere: one token a step, the exact decoding that the published numbers stand for.
Another table: copy this file, and name it with --task-table.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "gsm8k": _generated(5, 256, 8),  # [authors]; [llada] 78.6
            "mmlu_generative": _generated(5, 3, 3),  # [authors]
            "humaneval_instruct": _generated(0, 512, 32, executes_code=True),  # [authors]
            "humaneval": _generated(0, 512, 512, executes_code=True, logits_eos_inf=True),  # [llada]
            "minerva_math": _generated(0, 512, 64),  # [llada]
            "arc_challenge_chat": _generated(0, 512, 512),  # [llada]
            "gpqa_main_generative_n_shot": _generated(5, 64, 64, confidence_eos_eot_inf=True),  # [llada]
            "ifeval": _generated(0, 256, 16),  # [llada 1.5]
            "arc_challenge": _compared(0, 128),  # [llada]
            "hellaswag": _compared(0, 128),  # [llada]
            "piqa": _compared(0, 128),  # [llada]
            "winogrande": _compared(5, 128),  # [llada]
            "mmlu": _compared(5, 1),  # [llada] answers of one token, whose likelihood one mask gives exactly
        }
    )


def _generated(
    num_fewshot: int, gen_length: int, block_length: int, executes_code: bool = False, **options: Any
) -> dict[str, Any]:
    """A task whose answer is written; [authors] with the chat template, the examples inside the user's message."""
    sampler = {"gen_length": gen_length, "steps": gen_length, "block_length": block_length, "temperature": 0.0}
    return {
        "num_fewshot": num_fewshot,
        "chat_template": True,
        "sampler": {**sampler, "logits_eos_inf": False, "confidence_eos_eot_inf": False, **options},
        "draws": 128,  # not used
        "executes_code": executes_code,
    }


def _compared(num_fewshot: int, draws: int) -> dict[str, Any]:
    """A task whose answer is the likeliest of several; [llada] without the chat template."""
    return {
        "num_fewshot": num_fewshot,
        "chat_template": False,
        "sampler": {},  # nothing is sampled
        "draws": draws,
        "executes_code": False,
    }
