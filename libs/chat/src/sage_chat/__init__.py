"""One `Backend` protocol, five backends (mock, openai, finetune, vllm, ollama), and how a name picks one."""
