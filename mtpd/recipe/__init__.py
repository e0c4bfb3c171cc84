"""The recipe: what a distillation run is made of."""

from mtpd.recipe.pretrain import PretrainRecipe
from mtpd.recipe.recipe import Recipe, dump, load_pretrain_recipe, load_recipe, parse_recipe, recipe_schema
from mtpd.recipe.rules import DEEPSPEED_PRESETS, checkpoints_kept, compared_tokens, loss_weights, stages_of
from mtpd.recipe.sections import ExtendRecipe, HeadsRecipe

__all__ = [
    "DEEPSPEED_PRESETS",
    "ExtendRecipe",
    "HeadsRecipe",
    "PretrainRecipe",
    "Recipe",
    "checkpoints_kept",
    "compared_tokens",
    "dump",
    "load_pretrain_recipe",
    "load_recipe",
    "loss_weights",
    "parse_recipe",
    "recipe_schema",
    "stages_of",
]
