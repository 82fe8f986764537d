"""What a rank of `train_group` comes to need: tests/warm.py imports this once, and forks each rank from there.

Most of it is imported late, by whoever needs it first: in each rank anew, for a quarter of what a short training takes.
"""

import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in (
    *("pytest", "pandas", "pyarrow.compute", "boto3.s3.inject", "boto3.s3.transfer", "peft.tuners.lora.bnb"),
    *("deepspeed", "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer", "bitsandbytes"),
    *("deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("transformers.models.llama.modeling_llama", "transformers.models.mistral.modeling_mistral"),
    *("transformers.models.qwen2.modeling_qwen2", "peft.utils.transformers_weight_conversion"),
    *("ray_jobs.training.worker", "ray_jobs.adapters.recorded", "ray_jobs.adapters.dvora"),
    *("ray_jobs.kernels.float32_layers", "ray_jobs.kernels.fused_attention", "ray_jobs.kernels.fused_layer"),
    *("tests.doubles.datasets", "tests.models.train_group"),
):
    importlib.import_module(name)
get_checkpoint_conversion_mapping("llama")  # its table of all architectures is made once in a process
