"""Hugging Face interop: classes, configs and tensor names as data, and the folders they come in, without torch.

    classes.py    the classes and what each can express; choose_class
    config.py     config.json -> ModelConfig (config_keys.py, config_rope.py) and back (config_write.py)
    names.py      tensor names, shapes and layouts, both ways
    fold.py       multipliers and gains a class cannot hold, multiplied into the weights as they are read
    files.py      folders of safetensors, read lazily and written as a stream (arrays.py)
    weights.py    a folder's parameters under neo's names
    hub.py        folders fetched from the hub
"""
