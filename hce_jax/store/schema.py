"""The names that a store consists of: files, columns, and the side files that every store shares."""

SPLITS = ("train", "val", "test")

#: The name of the column that holds a cell's expression, and of the labels.
EXPRESSION_COLUMN = "X"
LABEL_COLUMN = "cell_type"

#: Columns of integer codes, each with its table in ``categorical_lookup/<column>.parquet`` (column "label", row = code).
CATEGORICAL_COLUMNS = (
    "cell_type",
    "dataset_id",
    "donor_id",
    "assay",
    "development_stage",
    "disease",
    "tissue",
    "tissue_general",
    "tech_sample",
)

VAR_FILE = "var.parquet"
LOOKUP_FOLDER = "categorical_lookup"
CLASS_WEIGHTS_FILE = "class_weights.npy"
AUGMENTATIONS_FILE = "augmentations.npy"
CHILD_MATRIX_FILE = "cell_type_hierarchy/child_matrix.npy"
STORE_FILE = "store.json"
