"""fairseq tasks: importing this package registers them (`--task caption`)."""

from narvl_plugin.tasks import caption, multitask, refcoco, snli_ve, vqa_gen

__all__ = ["caption", "multitask", "refcoco", "snli_ve", "vqa_gen"]
