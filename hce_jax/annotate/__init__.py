"""A user's own cells in, labels at the depth that the data support out.

The stages: ``query`` reads the cells, whatever the file; ``prepared`` finds matrix, scale and genes; the model is
asked; ``labels`` decides; ``output`` writes the annotated copy; ``report`` and ``contrast`` say what and why.
"""

from hce_jax.annotate.annotation import Annotation, Settings, annotate, annotate_file, files_of

__all__ = ["Annotation", "Settings", "annotate", "annotate_file", "files_of"]
