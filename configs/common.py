"""Every field of a run's configuration, with its meaning and unit; the values are the published recipe.

A run's own file changes a few of them, and the command line any: ``--config.batch_size=4096``.
"""

import os

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # --- data ---
    # Folder of the store. Empty: the built-in simulated atlas in ./data/simulated_v1, made when it is not there yet.
    config.data_path = os.environ.get("DATA_PATH", "")
    # File of the training weights of the cell types, in the store's folder.
    config.class_weights_filename = "class_weights.npy"
    # Share of the parts of train and val to use, in (0, 1]: the first ceil(share x parts). The test split stays whole.
    config.sub_sample_frac = 1.0
    # Seed of the order of cells. `seed` leaves it alone, so that runs of several seeds see the same order.
    config.data_seed = 0
    # Move each training cell along a random vector of the store's augmentations.npy, up or down.
    config.augment_training_data = False
    # Where the cells of train and val lie during training: disk; host (read once into its memory, about 4.5 kB a cell
    # of a cell store); device (packed in the devices' memory, where batches are then made without the host).
    config.cells_in = "disk"
    # Cells that are mixed with each other at a time. More: better mixing, more memory (about 10 kB a cell).
    config.shuffle_window = 32768

    # --- model ---
    # linear, mlp, tabnet.
    config.model_type = "linear"
    # Precision of matrix products: auto (float32 on a CPU, tf32 elsewhere, as published), float32, tf32, bf16.
    config.precision = "auto"

    # mlp: width of the hidden layers, their number, probability of dropping a hidden unit in training.
    config.hidden_size = 128
    config.n_hidden = 8
    config.dropout = 0.1
    # tabnet: width of a step's output (and of the embedding) and of the attention's input.
    config.n_d = 128
    config.n_a = 64
    # tabnet: decision steps; how soon a gene that one step has used is closed to the next (1: at once).
    config.n_steps = 1
    config.gamma = 1.3
    # tabnet: gated layers of each transformer, its own and those shared by all.
    config.n_independent = 5
    config.n_shared = 3
    # tabnet: cells of a ghost batch, and the share of the new value in its batch norms' running statistics.
    config.virtual_batch_size = 256
    config.momentum = 0.02
    # tabnet: entmax or sparsemax.
    config.mask_type = "entmax"
    # tabnet: weight of the masks' entropy in the objective.
    config.lambda_sparse = 1e-5

    # --- loss ---
    # Hierarchical cross entropy (true) or cross entropy (false).
    config.use_hierarchical_loss = False
    # Added to a subtree's probability before the logarithm, as published. 0: the exact loss by log-sum-exp, unbounded.
    config.epsilon = 1e-6

    # --- optimiser: AdamW on all parameters ---
    # Learning rate of the first epoch.
    config.learning_rate = 5e-4
    # Decoupled weight decay: a step multiplies each parameter by 1 - learning rate x this.
    config.weight_decay = 0.01
    # The learning rate is multiplied by gamma after every step_size epochs.
    config.lr_scheduler_step_size = 1
    config.lr_scheduler_gamma = 0.9
    # Largest global norm of the gradients. 0: no clipping.
    config.gradient_clip_val = 1.0

    # --- training ---
    # Cells a step, over all devices together. (On the small simulated atlas 2048 becomes 256.)
    config.batch_size = 2048
    # Epochs at most. (On the small simulated atlas 50 become 20.)
    config.max_epochs = 50
    # Epochs without a better validation macro F1 after which training stops.
    config.early_stopping_patience = 10
    # Seed of the initial weights, dropout and augmentation.
    config.seed = 1
    # Several seeds, and several losses out of 'ce', 'hce' and 'exact' (hce with an epsilon of 0): one model of each,
    # trained together on the same cells and left as runs of their own, in place of the one of `seed` and
    # `use_hierarchical_loss`.
    config.seeds = ()
    config.losses = ()

    # --- output ---
    # Folder of all runs. Empty: tb_logs in the store's folder.
    config.log_dir = ""
    # Name of the run's folder; "_hierarchical_loss" is appended where that loss is used.
    config.model_name = "linear"
    # Checkpoints kept: the best ones by validation macro F1.
    config.save_top_k = 1
    # Epochs from one checkpoint to the next; epochs between are validated but not saved.
    config.checkpoint_interval = 1
    # Minutes of training from one save for going on to the next; each epoch's end is one too. 0: those only.
    config.checkpoint_every_minutes = 10.0
    # Steps to record in a profile for TensorBoard, once the first ones are over. 0: none.
    config.profile_steps = 0
    # Steps from one TensorBoard point of the training loss to the next.
    config.log_every_n_steps = 50

    return config
