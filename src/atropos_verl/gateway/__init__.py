"""The HTTP surface that Atropos environments call: OpenAI's API and the native dialects of vLLM, SGLang and trl."""
