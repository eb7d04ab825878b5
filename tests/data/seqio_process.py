"""The part of test_seqio.py that needs TensorFlow, in one process: imports it once and prints what it found as JSON.

    python seqio_process.py FOLDER ROOT     (FOLDER has my_tasks.py and its files; it is the current folder)
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import random
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from neo.data import seqio_export, seqio_plan, seqio_prepare, tasks, tokenizer_training
from neo.data.seqio_prepare import MixtureRequest
from neo.data.tokenizer import Tokenizer, from_model
from neo.errors import NeoError

seqio = tasks.import_seqio()
import tensorflow as tf  # noqa: E402
import tensorflow_text  # noqa: E402

FOLDER, ROOT = Path(sys.argv[1]), Path(sys.argv[2])
FOUND: dict[str, Any] = {}
EDGES = ["", " ", "\n\n\t  x", "a\0b", "𠮷野家", "👩\u200d👩\u200d👧 ok", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดี", "▁x",
         "\ufffd", "e\u0301é",
         "\u3000全角", "0123456789 3.14", "</s><s><unk>", "<0x41>", "x" * 3000]
HAN = ("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈剑号巨阙珠称夜光"
       "果珍李柰菜重芥姜海咸河淡鳞潜羽翔龙师火帝鸟官人皇始制文字乃服衣裳推位让国有虞陶唐吊民伐罪周发殷汤坐朝问道垂拱平章")


def corpora() -> dict[str, list[str]]:
    draw = random.Random(0)
    english = [paragraph for path in sorted(ROOT.glob("docs/*.md")) for paragraph in path.read_text().split("\n\n")][:200]
    chinese = ["".join(draw.choices(HAN, k=draw.randrange(1, 120))) + "。Neo 2026" for _ in range(100)]
    code = [inspect.getsource(module)[:20000] for module in (textwrap, functools, random, inspect)]
    return {"en": english, "zh": chinese, "code": code, "edge": EDGES}


def message(function: Callable[[], Any]) -> list[Any]:
    """[exit code, text] of the error that `function` raises; [0, ""] for none."""
    try:
        function()
    except NeoError as error:
        return [error.exit_code, str(error)]
    return [0, ""]


def parity() -> None:
    texts = corpora()
    flat = [text for some in texts.values() for text in some]
    tokenizer = tokenizer_training.train(flat, 1200)
    tokenizer.save("bpe")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    model = tensorflow_text.SentencepieceTokenizer(model=tokenizer.model)
    fast = tensorflow_text.FastSentencepieceTokenizer(model=tokenizer.model)
    vocabulary = tasks.vocabulary("bpe")
    for kind, some in texts.items():
        other = dict.fromkeys(("tf_text", "sentencepiece", "seqio", "seqio_tf", "decoded", "fast"), 0)
        for text in some:
            ours = tokenizer.encode(text)
            other["tf_text"] += model.tokenize(text).numpy().tolist() != ours
            other["sentencepiece"] += processor.encode(text) != ours
            other["seqio"] += list(vocabulary.encode(text)) != ours
            other["seqio_tf"] += vocabulary.encode_tf(text).numpy().tolist() != ours
            decoded = model.detokenize(tf.constant(ours, tf.int32)).numpy().decode()
            other["decoded"] += decoded != tokenizer.decode(ours)
            other["fast"] += fast.tokenize(text).numpy().tolist() != ours
        FOUND[f"parity {kind}"] = {"texts": len(some), **other}
    FOUND["fast bpe"] = message(lambda: tasks.vocabulary("bpe", use_fast_tokenizer=True))
    with open("unigram.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts["en"]), model_writer=file, vocab_size=600,
                                                 byte_fallback=True, minloglevel=2)
    FOUND["fast unigram"] = message(lambda: tasks.vocabulary("unigram.model", use_fast_tokenizer=True))


class Here:
    """Stands for seqio_prepare.Child: the same functions, in this process."""

    asked: list[str] = []
    fail_on = ""

    def __init__(self, export: seqio_plan.Export, log: str):
        self.export = export

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def receive(self, kind: str) -> dict[str, Any]:
        seqio_plan.import_module(self.export.module)
        planned, self.tokenizer, facts = seqio_plan.plan(seqio, self.export)
        self.tokenizer.save(os.path.join(self.export.work, "tokenizer"))
        self.planned = {one.source: one for one in planned}
        return json.loads(json.dumps(facts))

    def ask(self, source: str) -> dict[str, Any]:
        if source == self.fail_on:
            raise KeyboardInterrupt
        self.asked.append(source)
        return seqio_export.write_task(seqio, self.planned[source], self.tokenizer, self.export, lambda **answer: None)


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def prepare(name: str, out: str, **changes: Any) -> seqio_prepare.Prepared:
    Here.asked = []
    request = MixtureRequest(name, changes.pop("module", "my_tasks"), out, validation=0.1, workers=1, **changes)
    prepared = seqio_prepare.prepare_mixture(request)
    FOUND[f"prepared {name} {out}"] = {"there": [there for _, there in prepared.manifests], "asked": list(Here.asked)}
    return prepared


def commands() -> None:
    """prepare_mixture: whole, again, killed between two sources, changed."""
    prepare("nested", "whole")
    FOUND["first"] = FOUND.pop("prepared nested whole")
    prepare("nested", "whole")
    Here.fail_on = "my_zh"
    try:
        prepare("nested", "killed")
    except KeyboardInterrupt:
        FOUND["killed"] = {"asked": list(Here.asked), "left": sorted(os.listdir("killed"))}
    Here.fail_on = ""
    prepare("nested", "killed")
    # Killed after the export, before its source was finished: nothing is read again.
    real, opened = (seqio_prepare.preparation.prepare, seqio_export.open_dataset), []
    seqio_prepare.preparation.prepare = interrupt
    try:
        prepare("my.zh", "exported")
    except KeyboardInterrupt:
        FOUND["exported"] = sorted(os.listdir("exported/.seqio"))
    seqio_prepare.preparation.prepare = real[0]
    seqio_export.open_dataset = lambda *arguments: opened.append(arguments)
    prepare("my.zh", "exported")
    seqio_export.open_dataset = real[1]
    FOUND["opened"] = len(opened)
    import my_tasks
    seqio.TaskRegistry.remove("my.code")
    my_tasks.add("code", upper=True)
    my_tasks.mix("changed", [("my.web", 1), ("my.code", 1)])
    FOUND["changed"] = message(lambda: prepare("changed", "whole"))
    FOUND["changed asked"] = list(Here.asked)
    prepare("changed", "whole", overwrite=True)
    prepare("extra", "extra_ids")
    prepare("my.question", "question", prompt_field="inputs", id_field="name")
    prepare("my.pretokenized", "pretokenized", tokenizer="tok")
    prepare("my.random", "random")
    prepare("my.random", "random_again")
    prepare("nested", "packed", packing="best_fit", seq_len=128)


def bad_input() -> None:
    cases = {
        "unknown": dict(name="nestd"), "split": dict(split="test"), "feature": dict(feature="target"),
        "module": dict(module="my_task"), "import error": dict(module="broken"), "syntax": dict(module="wrong/syntax.py"),
        "no file": dict(module="nothing.py"), "no module": dict(module=""), "id_field": dict(id_field="uri"),
        "bytes vocabulary": dict(name="my.bytes"), "two vocabularies": dict(name="mixed"), "fast": dict(name="my.fast"),
        "other tokenizer": dict(tokenizer="bpe"), "no tokenizer": dict(tokenizer="nowhere"),
        "sequence length": dict(name="my.needs_length"), "rates": dict(name="zero"), "rate": dict(name="callable"),
        "fails": dict(name="my.fails"), "text": dict(name="my.text"), "empty": dict(name="my.empty"),
        "outside": dict(name="my.pretokenized", tokenizer="small"), "missing files": dict(name="my.lines"),
        "validation": dict(validation=1.5), "same source": dict(name="same"),
    }
    for label, changes in cases.items():
        request = {"name": "nested", "module": "my_tasks", "out": f"bad_{label.replace(' ', '_')}", **changes}
        FOUND[f"bad {label}"] = [*message(lambda: seqio_prepare.prepare_mixture(MixtureRequest(**request))),  # noqa: B023
                                 os.path.exists(request["out"])]
    FOUND["bad store"] = message(lambda: seqio_prepare.prepare_mixture(MixtureRequest("my.other", "my_tasks", "whole")))
    os.makedirs("mine/my_web", exist_ok=True)
    Path("mine/my_web/manifest.json").write_text(Path("whole/my_web/manifest.json").read_text())
    FOUND["bad source"] = message(lambda: seqio_prepare.prepare_mixture(MixtureRequest("my.web", "my_tasks", "mine")))


def recipes() -> None:
    registered = tasks.register(str(ROOT / "tests/recipes/tiny.py"), inputs={"a": "texts/web.jsonl", "b": ["texts/*.txt"]},
                                tokenizer="tok", id_field="id")
    FOUND["registered"] = {"tasks": registered.tasks, "mixtures": registered.mixtures,
                           "rates": {name: {task.name: mixture.get_rate(task) for task in mixture.tasks}
                                     for name in registered.mixtures.values()
                                     for mixture in [seqio.MixtureRegistry.get(name)]}}
    task = seqio.TaskRegistry.get("neo.tiny.a")
    tokenizer = Tokenizer.load("tok")

    def read(**arguments: Any) -> list[list[int]]:
        return [example["targets"].tolist() for example in
                task.get_dataset(split="train", shuffle=False, **arguments).as_numpy_iterator()]

    whole, cut = read(sequence_length=None), read(sequence_length={"targets": 64})
    FOUND["chunk"] = {"same": sum(cut, []) == sum(whole, []), "ends": all(one[-1] == tokenizer.eod_id for one in whole),
                      "longest": [max(map(len, whole)), max(map(len, cut))], "examples": [len(whole), len(cut)]}
    lost = task.replace(name="lost", preprocessors=[step for step in task.preprocessors if step is not tasks.chunk])
    trimmed = [len(example["targets"]) for example in
               lost.get_dataset(split="train", shuffle=False, sequence_length={"targets": 64}).as_numpy_iterator()]
    FOUND["seqio loses"] = [sum(trimmed), sum(map(len, whole))]
    mixture = seqio.get_mixture_or_task("neo.tiny.phase.short")
    examples = list(mixture.get_dataset(sequence_length={"targets": 64}, split="train", seed=1).take(40).as_numpy_iterator())
    FOUND["mixed"] = [len(examples), sorted(examples[0])]
    prepare("neo.tiny.phase.short", "tiny")
    tiny = str(ROOT / "tests/recipes/tiny.py")
    FOUND["register twice"] = message(lambda: tasks.register(tiny, "texts/{source}.jsonl", "tok"))
    FOUND["register missing"] = message(lambda: tasks.register(tiny, {"a": "x"}, "tok"))
    FOUND["register unknown"] = message(lambda: tasks.register(tiny, {"a": "x", "b": "x", "bb": "x"}, "tok"))
    FOUND["register pattern"] = message(lambda: tasks.register(tiny, "texts/*.jsonl", "tok"))
    real = tasks.register("yulan_mini", "texts/{source}/", "tok")
    FOUND["yulan"] = [len(real.tasks), len(real.mixtures), len(set(real.tasks.values()))]
    dataset()


def dataset() -> None:
    """A TFDS data set of this folder."""
    import tensorflow_datasets as tfds
    tfds.disable_progress_bar()

    class Tales(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
                {"story": tfds.features.Text(), "key": tfds.features.Text()}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"story": f"once upon a time {i}", "key": f"tale {i}"}

    Tales(data_dir="tfds").download_and_prepare()
    config = ROOT / "tests/recipes/tiny.py"
    Path("tales.py").write_text(config.read_text().replace("dict(a=0.7, b=0.3)", "dict(a=1.0)")
                                .replace("dict(a=0.5, b=0.5)", "dict(a=1.0)"))
    tasks.register("tales.py", {"a": "tfds:tales:1.0.0"}, "tok", text_field="story", id_field="key", tfds_data_dir="tfds")
    prepare("neo.tales.a", "tales", id_field="id")


def unigram() -> None:
    """A unigram model is taken; what is cut another way is counted."""
    model = from_model(Path("unigram.model").read_bytes(), "unigram.model")
    facts = seqio_export.Facts()
    comparison = seqio_export.Comparison(seqio.SentencePieceVocabulary("unigram.model"), model, facts)
    for text in corpora()["code"]:
        comparison.add("x", np.array(model.encode(text)), text)
    FOUND["unigram"] = facts.compared
    other = seqio_export.Comparison(seqio.SentencePieceVocabulary("bpe/tokenizer.model"), Tokenizer.load("tok"), facts)
    FOUND["other ids"] = message(lambda: other.add("d1", np.array([5]), "the fox"))


if __name__ == "__main__":
    tf.random.set_seed(0)
    os.chdir(FOLDER)
    sys.path.insert(0, str(FOLDER))
    seqio_prepare.Child = Here
    for part in (parity, commands, bad_input, recipes, unigram):
        part()
    print(json.dumps(FOUND))
