"""Commands of ``finetune`` that have no package of their own."""
