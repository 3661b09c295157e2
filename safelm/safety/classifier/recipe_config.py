"""The config of a training run: every field with its default, and a config as a `Recipe`."""

from ml_collections import ConfigDict, config_dict

from safelm.safety.classifier.balance import Balance
from safelm.safety.classifier.head import HeadRecipe
from safelm.safety.classifier.training import Recipe
from safelm.safety.classifier.tuning import TuningRecipe


def default_config() -> ConfigDict:
    """Every field there is; see `Recipe`, `HeadRecipe`, `TuningRecipe` and `load_backbone` for their meaning."""
    return ConfigDict(
        {
            "backbone": {
                "source": config_dict.placeholder(str),
                "layer": config_dict.placeholder(tuple),
                "pooling": config_dict.placeholder(str),
                "max_tokens": config_dict.placeholder(int),
                "prefix": config_dict.placeholder(str),
                "normalize": config_dict.placeholder(bool),
                "dtype": "float32",
            },
            "data": (),  # see `examples`
            "balance": {"cap": config_dict.placeholder(int), "caps": (), "power": 1.0},
            "harm_weight": 1.0,  # lambda
            "head": {
                "solver": "adam",
                "epochs": 1,
                "learning_rate": 1e-3,
                "batch_size": 32,
                "standardize": False,
                "l2": (),  # to choose from (not "adam")
            },
            "tuning": {
                "last_n": config_dict.placeholder(int),  # None: all parameters; 0: none
                "epochs": 5,
                "learning_rate": 1e-6,
                "batch_tokens": 4096,
                "weight_decay": 1e-3,
                "schedule": "constant",
                "selection": "recall_1",
                "patience": config_dict.placeholder(int),
            },
            "target_recall_1": 0.9,
            "target_recall_3": 0.9,
            "folds": 5,
            "held_out": 0.2,
            "split": "balanced",
            "seed": 0,
        }
    )


def recipe(config: ConfigDict) -> Recipe:
    """The recipe a config describes. Raises ValueError for a field out of its range or a backbone that is not set."""
    backbone = config.backbone.to_dict()
    if not backbone["source"]:
        raise ValueError("backbone.source is not set: give --config.backbone.source=FOLDER")
    head = config.head.to_dict()
    l2 = tuple(head.pop("l2"))
    return Recipe(
        backbone=backbone,
        head=HeadRecipe(**head, harm_weight=config.harm_weight, seed=config.seed, l2=l2[0] if l2 else 0.0),
        tuning=TuningRecipe(**config.tuning.to_dict(), seed=config.seed),
        l2=l2,
        balance=Balance(**config.balance.to_dict()),
        target_recall={1: config.target_recall_1, 3: config.target_recall_3},
        folds=config.folds,
        held_out=config.held_out,
        split=config.split,
        seed=config.seed,
    )
