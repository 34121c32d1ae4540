"""The multilayer perceptron (8 hidden layers of 128) with cross entropy.

Expected: macro F1 about 82 % on the published store's test split and 57 % on new studies (the paper's figures).

    python train.py --config configs/mlp_ce.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model_type = "mlp"
    config.model_name = "mlp"
    config.use_hierarchical_loss = False
    config.learning_rate = 2e-3
    config.weight_decay = 0.05
    config.augment_training_data = True
    return config
