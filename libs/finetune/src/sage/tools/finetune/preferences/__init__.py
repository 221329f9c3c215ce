"""Learning from preferences: DPO, KTO and ORPO, trained by TRL inside our runs."""
