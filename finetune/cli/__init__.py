"""The commands of ``finetune``, one module each."""
