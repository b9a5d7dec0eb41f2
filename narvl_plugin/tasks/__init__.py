"""fairseq tasks: importing this package registers them (`--task caption`)."""

from narvl_plugin.tasks import caption, refcoco, snli_ve, vqa_gen

__all__ = ["caption", "refcoco", "snli_ve", "vqa_gen"]
