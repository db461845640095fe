"""What the documents say is run: every code block, link, symbol, test, key and default that they name.

The blocks of one document run in order, in one namespace and in a folder of its own. Hub names are folders of tiny
towers there, so that snippets run as they are printed, and nothing is downloaded.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import pkgutil
import re
import shlex
import shutil
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tiny import randomise
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForQuestionAnswering,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from trips import cli
from trips.config import SelectionConfig
from trips.train.recipe_io import list_recipes, load_recipe, recipe_keys

REPOSITORY = Path(__file__).resolve().parents[1]
RUN = (
    "README.md",
    *(f"docs/{name}.md" for name in ("quickstart", "training", "data_formats", "checkpoints", "acceleration")),
)
DOCUMENTS = ("README.md", *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md")))

# How a documented command is run here: what is put behind it so that it takes seconds.
BEHIND = {
    "quickstart": ("--scale=smoke",),
    "train": ("--optim.steps=2", "--optim.warmup_steps=1"),
    "evaluate": (),
    "ask": (),
    "score": (),
    "recipes": (),
    "data": (),
    "flops": (),
    "table": (),
    "import": (),
}
# What the make targets stand for; the others are only checked to exist.
TARGETS = {"quickstart": "trips quickstart"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line that it starts at."""

    language: str
    text: str
    line: int


def read(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    found = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(match[1].strip(), match[2], text[: match.start()].count("\n") + 2))
    assert text.count("```") == 2 * len(found), "a fence is not closed"
    return found


def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# --- the folder in which the snippets run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny towers under the hub names of the documents, a photo, and tars of questions about it."""
    folder = tmp_path_factory.mktemp("docs")
    vision = Dinov2Config(
        hidden_size=16, num_hidden_layers=12, num_attention_heads=2, mlp_ratio=1, image_size=224, patch_size=14
    )
    name = folder / "facebook" / "dinov2-small"
    randomise(Dinov2Model(vision)).save_pretrained(name)
    preprocessor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    (name / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    tokenizer = letter_tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    text = BertConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=64)
    for saved in (randomise(BertModel(text, add_pooling_layer=False)), tokenizer):
        saved.save_pretrained(folder / "sentence-transformers" / "all-MiniLM-L6-v2")
    write_blip(folder / "Salesforce" / "blip-vqa-base")
    Image.effect_noise((320, 240), 60).convert("RGB").save(folder / "kitchen.jpg")
    for split, count in (("train", 17), ("test", 2)):
        write_tar(folder / "data" / f"daquar-{split}-000.tar", split, count, (folder / "kitchen.jpg").read_bytes())
    write_album(folder / "album", 16)
    shutil.copytree(REPOSITORY / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results"))
    return folder


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece of single characters, with [CLS] and [SEP] at BERT's own ids."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?,."
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}
    for i, piece in enumerate([*letters, *(f"##{letter}" for letter in letters)]):
        vocabulary[piece] = 1 + i
    vocabulary |= {f"[unused{i}]": i for i in range(1 + 2 * len(letters), 100)}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **special)


def write_blip(folder: Path) -> None:
    """A BLIP of the real depth and resolution, narrow, that takes BERT's own ids up to 2999."""
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**shape, "encoder_hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 3000}
    text |= {"bos_token_id": 1, "eos_token_id": 102, "sep_token_id": 102, "pad_token_id": 0}
    vision = {**shape, "num_hidden_layers": 12, "image_size": 384, "patch_size": 16}
    randomise(BlipForQuestionAnswering(BlipConfig(vision_config=vision, text_config=text))).save_pretrained(folder)


def write_tar(path: Path, split: str, count: int, image: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            answer = ("2", "cup", "red, blue")[i % 3]
            question = {"question_id": f"{split}-{i}", "question": "what is it ?", "answer": answer}
            meta = json.dumps({"image_id": f"{split}-{i}", "questions": [question]}).encode()
            for suffix, content in (("jpg", image), ("json", meta)):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_album(folder: Path, count: int) -> None:
    """Photos with a caption and a question each, as a camera and two tables would have them."""
    folder.mkdir()
    lines, questions = ["image,caption"], ["image,question,answer"]
    for i in range(count):
        Image.effect_noise((80, 60), 20 + 5 * i).convert("RGB").save(folder / f"{i}.jpg")
        lines.append(f"{i}.jpg,cup number {i} on the table")
        questions += [f"{i}.jpg,what is on the table ?,cup", f"{i}.jpg,how many ?,{i % 3}"]
    (folder / "captions.csv").write_text("\n".join(lines))
    (folder / "questions.csv").write_text("\n".join(questions))


# --- running


def check(words: list[str], where: str) -> list[str] | None:
    """Check one command of a document; return the arguments of trips if it is one that can be run here."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable of the environment
        words = words[1:]
    if words[0] == "make":
        makefile = read("Makefile")
        for target in words[1:]:
            assert re.search(rf"^{re.escape(target)}:.*##", makefile, re.MULTILINE), f"{where}: no target {target}"
        (target,) = words[1:]
        return shlex.split(TARGETS[target])[1:] if target in TARGETS else None
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
        named = re.search(r"\[(.*)\]", words[-1])
        assert named and set(named[1].split(",")) <= set(extras), f"{where}: no such extra"
        return None
    if words[0] == "python":
        script = REPOSITORY / words[1]
        assert script.is_file(), f"{where}: no such script"
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in script.read_text(encoding="utf-8"), f"{where}: no option {option}"
        return None
    if words[0] in ("torchrun", "accelerate"):
        verb, recipe, *overrides = words[words.index("trips.cli") + 1 :]
        assert words[words.index("trips.cli") - 1] == "-m" and verb == "train", where
        load_recipe(recipe, overrides)
        return None
    assert words[0] == "trips", f"{where}: {shlex.join(words)} is not in the table of this test"
    return words[1:]


def run_trips(arguments: list[str], where: str) -> None:
    if "--help" not in arguments:
        assert arguments[0] in BEHIND, f"{where}: trips {arguments[0]} is not in the table of this test"
        arguments = [*arguments, *BEHIND[arguments[0]]]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    assert code == 0, f"{where}: trips {shlex.join(arguments)} ended with {code}: {err.getvalue()[-500:]}"
    assert out.getvalue().strip(), f"{where}: trips {shlex.join(arguments)} prints nothing"
    if "--json" in arguments:
        json.loads(out.getvalue())


def run_document(document: str, text: str, folder: Path) -> dict[str, Any]:
    """Run all blocks of a document; returns the namespace of its Python."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(text):
        where = f"{document}:{block.line}"
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(folder / document), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, namespace)
        elif block.language == "bash":
            for words in commands(block):
                if (arguments := check(words, where)) is not None:
                    run_trips(arguments, where)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            (folder / "recipe.yaml").write_text(block.text)
            load_recipe(folder / "recipe.yaml")
        else:
            assert block.language == "bibtex", f"{where}: a block of {block.language or 'no language'} is not handled"
    return namespace


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_readme_runs(folder: Path) -> None:
    names = run_document("README.md", read("README.md"), folder)
    assert tuple(names["output"].selections[-1].kept.shape) == (3, 127)  # as its comment says
    assert names["prefix"].layer == 5 and names["prefix"].states.shape[0] == 1
    assert len(names["report"].loaded) > len(names["report"].initialised) > 0
    assert (folder / "runs" / "daquar_small" / "results.json").is_file()


@pytest.mark.parametrize("document", RUN[1:])
def test_documents_run(document: str, folder: Path) -> None:
    run_document(document, read(document), folder)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name not in RUN])
def test_commands_of_other_documents_are_real(document: str) -> None:
    for block in blocks(read(document)):
        where = f"{document}:{block.line}"
        assert block.language == "bash", f"{where}: only commands are expected here"
        for words in commands(block):
            arguments = check(words, where)
            if arguments is not None and arguments[0] == "train":
                load_recipe(arguments[1], arguments[2:])
            elif arguments is not None:
                assert arguments[0] in cli.VERBS, where
                if arguments[0] not in ("data", "evaluate"):
                    own = cli._split_overrides(arguments)[0] if arguments[0] in cli._POSITIONAL else arguments
                    cli._parser(arguments[0]).parse_args(own)  # verb and options exist


@pytest.mark.parametrize(
    "text", ["```\nx\n```\n", "```bash\nrm -r x\n```\n", "```bash\nmake nothing\n```\n", "```bash\ntrips fly\n```\n"]
)
def test_what_is_not_handled_fails(text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"bad\.md:2"):
        run_document("bad.md", text, tmp_path)


# --- names


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_local_links_lead_somewhere(document: str) -> None:
    base = (REPOSITORY / document).parent
    links = re.findall(r"\]\(([^)\s]+)\)", read(document))
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if link and not (base / link).exists()] == []


def paper_map() -> list[tuple[str, str, str]]:
    """(paper, symbol, test) of every row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in read("docs/paper_map.md").splitlines()]
    return [(row[0], row[2].strip("`"), row[3].strip("`")) for row in rows if len(row) == 4 and "`" in row[2]]


@pytest.mark.parametrize(("paper", "symbol", "test"), paper_map())
def test_paper_map_names_what_exists(paper: str, symbol: str, test: str) -> None:
    value = pkgutil.resolve_name(symbol)
    assert value.__doc__
    if paper.startswith("Eq. "):
        assert paper in value.__doc__.splitlines()[0]
    file, _, function = test.partition("::")
    tree = ast.parse((REPOSITORY / "tests" / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_paper_map_has_every_equation_and_each_stands_once_in_the_source() -> None:
    assert len(paper_map()) > 30
    papers = [paper for paper, _, _ in paper_map()]
    for number in (1, 2, 3):
        assert papers.count(f"Eq. {number}") == 1
    source = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "src").rglob("*.py"))
    assert source.count("(Eq. 2)") == source.count("(Eq. 3)") == 1


def test_keys_of_recipes_and_recipes_themselves_exist() -> None:
    keys, recipes = set(recipe_keys()), set(list_recipes())
    sections = {key.partition(".")[0] for key in keys if "." in key}
    text = "\n".join(read(document) for document in DOCUMENTS)
    named = set(re.findall(rf"`((?:{'|'.join(sections)})\.[\w.]+)`", text))
    assert len(named) > 10
    assert named - keys - ATTRIBUTES == set()
    assert set(re.findall(r"\b(?:vqa|debug)/\w+_\w+\b", text)) <= recipes
    assert set(re.findall(r"`trips (\w+)", text)) <= set(cli.VERBS)


ATTRIBUTES = {"model.config.selection"}  # of a Python object, where a key of that form would be none


def test_table_of_defaults_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.*) \|$", read("docs/decisions.md"), re.MULTILINE)
    assert {name: ast.literal_eval(value) for name, value, _ in rows} == dataclasses.asdict(SelectionConfig())
    for name, value, others in rows:
        if value.startswith('"'):  # every other value is accepted, and no value is missing
            values = {ast.literal_eval(value), *re.findall(r'`"(\w+)"`', others)}
            with pytest.raises(ValueError) as caught:
                SelectionConfig(**{name: "no such value"})
            assert values == set(caught.value.expected.split(" | "))


def test_packaged_recipe_stands_on_its_own() -> None:
    recipe = load_recipe("vqa/daquar_small")
    assert recipe.model.vision == "facebook/dinov2-small"
    assert recipe.model.text == "sentence-transformers/all-MiniLM-L6-v2"
    assert recipe.data.train == ("data/daquar-train-*.tar",) and recipe.data.test == ("data/daquar-test-*.tar",)
    path = REPOSITORY / "src" / "trips" / "recipes" / "vqa" / "daquar_small.yaml"
    assert ".." not in json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")))
