"""sage finetune preview: rows as the model will see them."""
