"""The paper's study: three models, each with cross entropy and with hierarchical cross entropy, of four seeds.

    python -m hce_jax reproduce --config configs/paper.py

A field above the models' is that of all of them; those of one model are its own: ``--config.tabnet.batch_size=1024``.
"""

import os

from ml_collections import ConfigDict

from configs import linear_ce, mlp_ce, tabnet_ce


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Folder of the store. Empty: the built-in simulated atlas in ./data/simulated_v1.
    config.data_path = os.environ.get("DATA_PATH", "")
    # New studies (ood): an h5ad file with raw counts, or a folder of such. Empty: those in ood/ of the store's folder,
    # or, where there are none, the studies that the Census of 2023-12-15 has beyond that of 2023-05-15, downloaded
    # once. none: held-out donors only.
    config.new_studies = ""
    # Folder of all runs. Empty: tb_logs in the store's folder.
    config.log_dir = ""
    # The models, out of those below.
    config.models = ("linear", "mlp", "tabnet")
    # Losses out of 'ce', 'hce' and 'exact' (hce with an epsilon of 0); the others are compared with ce.
    config.losses = ("ce", "hce")
    # Seeds of the initial weights, dropout and augmentation. Each model is trained with all losses and seeds at once.
    config.seeds = (1, 2, 3, 4)
    # Epochs at most, and epochs without a better validation macro F1 after which training stops. (On the small
    # simulated atlas 50 become 20.)
    config.max_epochs = 50
    config.early_stopping_patience = 10

    for name, recipe in (("linear", linear_ce), ("mlp", mlp_ce), ("tabnet", tabnet_ce)):
        config[name] = recipe.get_config()
        for shared in (*config, "seed", "use_hierarchical_loss"):
            if shared in config[name]:
                del config[name][shared]
    return config
