"""The recipe: what a distillation run is made of."""

from mtpd.recipe.pretrain import PretrainRecipe
from mtpd.recipe.recipe import Recipe, dump, load_pretrain_recipe, load_recipe, parse_recipe
from mtpd.recipe.rules import DEEPSPEED_PRESETS, compared_tokens, loss_weights, stages_of
from mtpd.recipe.sections import ExtendRecipe, HeadsRecipe

__all__ = [
    "DEEPSPEED_PRESETS",
    "ExtendRecipe",
    "HeadsRecipe",
    "PretrainRecipe",
    "Recipe",
    "compared_tokens",
    "dump",
    "load_pretrain_recipe",
    "load_recipe",
    "loss_weights",
    "parse_recipe",
    "stages_of",
]
