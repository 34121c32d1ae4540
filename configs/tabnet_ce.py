"""TabNet (one decision step, 1.5-entmax) with cross entropy.

Expected: macro F1 about 84 % on the published store's test split and 52 % on new studies (the paper's figures).

    python train.py --config configs/tabnet_ce.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model_type = "tabnet"
    config.model_name = "tabnet"
    config.use_hierarchical_loss = False
    config.learning_rate = 5e-3
    config.weight_decay = 0.05
    config.augment_training_data = True
    return config
