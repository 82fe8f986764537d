"""What transformers, peft, TRL, Axolotl and LLaMA-Factory call keys of the config. None of these is a key of ours."""

_THEIRS = {
    "data.eval_share": "test_size val_set_size val_size",
    "data.max_records": "max_samples",
    "data.source": "dataset dataset_name path",
    "method.alpha": "lora_alpha",
    "method.base": "load_in_8bit",
    "method.dropout": "lora_dropout",
    "method.name": "load_in_4bit",
    "method.rank": "lora_r lora_rank r",
    "method.target_modules": "lora_target lora_target_modules",
    "model.base": "base_model model_name_or_path",
    "model.max_length": "cutoff_len max_seq_len max_seq_length sequence_len",
    "ray.num_workers": "num_gpus",
    "train.batch_size": "gradient_accumulation_steps",
    "train.checkpoint_every_steps": "save_steps",
    "train.dtype": "bf16 fp16",
    "train.epochs": "num_epochs num_train_epochs",
    "train.evals_per_epoch": "eval_steps",
    "train.keep_checkpoints": "save_total_limit",
    "train.learning_rate": "lr",
    "train.micro_batch_size": "per_device_train_batch_size",
    "train.optimizer": "optim",
    "train.packing": "sample_packing",
    "train.warmup_share": "warmup_ratio warmup_steps",
}
SYNONYMS = {theirs: ours for ours, names in _THEIRS.items() for theirs in names.split()}
