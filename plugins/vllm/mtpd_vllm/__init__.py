"""Chain heads of mtpd in vLLM: several distinct heads beside an unchanged base.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. It adds a config class
and a model class by vLLM's public registries. vLLM's V2 runner then serves the heads with its own speculator; on the
V1 runner, which has none for several heads, one class is replaced (`proposer.py`).
"""

ARCHITECTURE = "MtpdChainMTP"
"""The model class that the `config.json` of an export names."""


def register() -> None:
    """Adds the heads to vLLM; may be called several times.

    On a vLLM that is not known, the config class alone is added, which then refuses in one line: other models are
    served as if the plugin were not there.
    """
    from transformers import AutoConfig

    from mtpd_vllm.checks import refused_version
    from mtpd_vllm.config import MtpdConfig

    AutoConfig.register(MtpdConfig.model_type, MtpdConfig, exist_ok=True)
    if refused_version() is not None:
        return
    from vllm import ModelRegistry

    from mtpd_vllm.proposer import install

    # By name: importing the class would start what belongs to the process that loads the model.
    ModelRegistry.register_model(ARCHITECTURE, "mtpd_vllm.model:MtpdChainMTP")
    install()
