"""What the serving engine does with an artifact; knows vLLM, not our plans."""
