"""Chain heads: K heads in DeepSeek-V3 form, each reading the state of the one before."""
