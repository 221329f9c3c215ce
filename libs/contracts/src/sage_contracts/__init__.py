"""Wire types, training configuration, job states and errors shared by every part of SAGE Finetune."""
