"""The commands of ``finetune``, one module each: parsing and printing."""
