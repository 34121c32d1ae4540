"""The linear classifier with cross entropy.

Expected: macro F1 about 80 % on the published store's test split and 55 % on new studies (the paper's figures).

    python train.py --config configs/linear_ce.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model_type = "linear"
    config.model_name = "linear"
    config.use_hierarchical_loss = False
    config.learning_rate = 5e-4
    config.weight_decay = 0.01
    return config
