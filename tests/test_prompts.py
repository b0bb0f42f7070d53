"""Prompt files: each form is read, or refused by name."""

import json
import weakref

import pytest
from PIL import Image

from common import prompts
from common.prompts import Prompt, read_prompts

A, B = "a red disc, moving", 'say "hi"'
INFO = [{"prompt_en": A, "dimension": ["color"], "auxiliary_info": {"color": {"x": [1, None]}}},
        {"prompt_en": B, "dimension": []}]  # the shape of VBench_full_info.json


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name, content", [
    ("a.txt", f"{A}\n{B}\n"),
    ("a", f"\ufeff{A}\r\n\r\n  {B}"),
    ("a.json", json.dumps([A, B])), ("a.JSON", json.dumps([A, {"text": B}], indent=2)),
    ("a.json", "\ufeff\r\n" + json.dumps(INFO, indent=1).replace("\n", "\r\n")),
    ("a.jsonl", f'{{"prompt": {json.dumps(A)}, "score": NaN}}\n\n{{"caption": "say \\"hi\\""}}\n'),
    ("a.jsonl", "".join(json.dumps(x) + "\r\n" for x in INFO)),
    ("a.ndjson", f"{json.dumps(A)}\n{json.dumps(B)}"),
    ("a.jsonl", '{"Prompt": "a red disc, moving", "caption": null, "image": ""}\n'
                '{"text": " say \\"hi\\" "}'),
    ("a.csv", f'id,prompt,id\n1,"{A}",x\n,,\n2,"say ""hi""",\n'),
    ("a.csv", f'\ufeff"Prompt"\r\n"{A}"\r\n\r\n"say ""hi"""\r\n'),
    ("a.csv", f'prompt,image,caption\n"{A}", ,\n," ","say ""hi"""\n'),  # blank cells
    ("a.tsv", f"caption\tid\n{A}\t1\nsay \"hi\"\t2\n")])
def test_each_form_gives_the_same_prompts(tmp_path, name, content):
    assert read_prompts(write(tmp_path, name, content)) == [Prompt(A), Prompt(B)]


@pytest.mark.parametrize("line", [
    "[cinematic] a dog", "[[cinematic]] a dog", "{red|blue} dog", '"Stop", says a sign', '"a dog"',
    '["Stop" sign] a road', '["Hello", it says] a dog', "['90s style] a dog", "--seed 3",
    "../../etc/passwd", "prompts.csv", "# a hash", "<b>$x^2$ {0} %s", "a,b\tc;d", "[0:05] a dog",
    "text, in neon", "a caption; a prompt", "'tis a dog", "null", "3", "a\u2028b\u0085c\x0bd\re"])
def test_a_line_of_text_is_a_prompt_whatever_it_looks_like(tmp_path, line):
    for content, expected in ((line, [line]), (f"{line}\na cat\n", [line, "a cat"]),
                              (f"a cat\n{line}\n", ["a cat", line])):
        got = read_prompts(write(tmp_path, "a.txt", content))
        assert got == [Prompt(text) for text in expected]


def test_a_file_of_100_000_long_captions_is_read(tmp_path):
    lines = b"a" * 800_000 + b"\n"  # a line stands for a thousand: the file's size is what matters
    assert len(read_prompts(write(tmp_path, "a.txt", lines * 100))) == 100


def test_images_are_checked_without_keeping_all_of_them_in_memory(tmp_path, monkeypatch):
    class Pixels:
        shape = (1, 1, 3)

    living, most = weakref.WeakSet(), [0]

    def decode(path):
        living.add(pixels := Pixels())
        most[0] = max(most[0], len(living))
        return pixels

    monkeypatch.setattr(prompts, "decode_image", decode)
    lines = "".join(f'{{"prompt": "a dog", "image": "{i}.png"}}\n' for i in range(100))
    assert len(read_prompts(write(tmp_path, "a.jsonl", lines), images=True)) == 100
    assert 0 < most[0] <= 16  # two for each of 8 threads


def test_prompts_keep_what_their_form_can_hold(tmp_path):
    table = write(tmp_path, "a.csv", 'prompt,n\r\n"two\r\nlines, ""quoted""",1\r\n🦊 über,2\r\n')
    assert read_prompts(table) == [Prompt('two\nlines, "quoted"'), Prompt("🦊 über")]
    pair = write(tmp_path, "a.jsonl", '{"prompt": "\\ud83e\\udd8a\\n[a]"}')
    assert read_prompts(pair) == [Prompt("🦊\n[a]")]


@pytest.mark.parametrize("name, content, message", [
    # invalid JSON
    ("a.json", "[\n1,\n}", "the file: is not valid JSON .*line 3"),
    ("a.json", "a dog", "the file: is not valid JSON"),
    ("a.json", "[" * 100_000 + "]" * 100_000, "the file: is not valid JSON .*recursion"),
    ("a.jsonl", '{"prompt": "a"}\na dog', "line 2: is not valid JSON"),
    # JSON of another shape
    ("a.json", '"a dog"', "the file: expected a list, got 'a dog': give a list of"),
    ("a.json", '{"prompts": ["a"]}', "the file: expected a list, got {"),
    ("a.json", '[["a", "b"]]', r"the file: \[0\]: expected text or .*\['a', 'b'\]"),
    ("a.json", '["a",\n 3]', r"the file: \[1\]: expected text or a JSON object, got 3"),
    ("a.json", '["a", ""]', "entry 2: expected one prompt .*, got ''"),
    ("a.json", "[]", "got an empty prompt file"),
    ("a.json", '[{"prompt": NaN}]', "entry 1: expected .*got .*nan"),
    ("a.json", '["\\ud800 a"]', "entry 1 is not UTF-8 text"),
    ("a.jsonl", '{"prompt": "a\\u0000"}', "line 1 is not UTF-8 text: remove NUL"),
    ("a.jsonl", '{"prompt": "a", "caption": "b"}', "line 1: expected one prompt and at most one"),
    ("a.jsonl", '{"prompt": " "}', "line 1: expected one prompt"),
    ("a.jsonl", '{"prompt_cn": "a"}', "line 1: expected one prompt"),
    # tables
    ("a.csv", "a dog\na cat", "line 2: expected one prompt .* got {'a dog': 'a cat'}"),
    ("a.csv", "caption;seed\na;1", "line 2: expected one prompt"),
    ("a.jsonl", '{"prompt": "a", "image": 0}', "line 1: expected one prompt and at most one image"),
    ("a.csv", "prompt,prompt\na,b", "line 1: expected one column 'prompt', got several"),
    ("a.csv", "prompt,Prompt\na,b", "line 2: expected one prompt"),
    ("a.csv", "prompt,image,image_path\na,b,c", "line 2: expected one prompt and at most"),
    ("a.csv", 'prompt\n"a\nb"\na dog, running', "line 4: expected 1 cells.*quote a prompt"),
    ("a.csv", "prompt,id\na", "line 2: expected 2 cells"),
    ("a.csv", "id;prompt\n1;a dog, running", "line 2: expected 1 cells.*with ',' between them"),
    ("a.csv", 'id,prompt\n1,a\n2,\n', "line 3: expected one prompt"),
    ("a.csv", 'prompt\na\n"b" c\n', "line 3 is not a row of a table"),
    ("a.csv", 'prompt\na\n"b\n', "line 3 is not a row of a table"),
    ("a.csv", "prompt\n\n", "got an empty prompt file"),
    # text that is not prompts
    ("a.txt", "Prompt\na dog", "line 1: expected one prompt per line, got the header .*rename"),
    ("a.txt", '\nid,"prompt"\n1,a', "line 2: expected .*got the header of a table"),
    ("a", "id\tcaption\n1\ta", "line 1: expected .*got the header of a table"),
    ("a.txt", '["a",\n"b"]', "line 1: expected one prompt per line, got JSON"),
    ("a.txt", '["a", "b"]', "got JSON"), ("a.txt", '[\n"a"]', "got JSON"),
    ("a.txt", '{"prompt": "a"}\n', "got JSON"), ("a.txt", '[{"prompt": "a"},', "got JSON"),
    ("a.txt", "[" * 100_000, "got JSON"),
    # other files
    ("a.yaml", "prompts:\n- a dog", "expected .txt, .* or .tsv: convert"),
    ("a.txt", " \n\n", "got an empty prompt file"),
    ("a.txt", b"good\ncaf\xe9 noir\n", "line 2 is not UTF-8: save"),
    ("a.txt", "a dog\nb".encode("utf-16"), "line 1 is not UTF-8"),
    ("a.txt", "a dog\nb".encode("utf-16-le"), "line 1 is not UTF-8 text"),
    ("a.csv", b"prompt\n\xe9", "line 2 is not UTF-8: save")])
def test_other_content_is_refused_by_file_and_place(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 500 + len(str(path))


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"prompt": "a", "image_path": "x/b.png"}'), ("a.csv", "prompt,image\na,x/b.png\n"),
    ("a.json", '[{"caption": "a", "image": "x/b.png", "id": 1}]'),
    ("a.tsv", "image_path\ttext\nx/b.png\ta\n")])
def test_images_are_relative_to_the_file_in_every_form(tmp_path, monkeypatch, name, content):
    monkeypatch.setenv("RANK", "1")  # rank 0 decodes them
    path = write(tmp_path, name, content)
    assert read_prompts(path, images=True) == [Prompt("a", tmp_path / "x/b.png")]
    with pytest.raises(ValueError, match='[12] has an "image"; the preset.s model takes none'):
        read_prompts(path)


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "prompt,image\na,b.png\n", "a.csv: .*b.png: no such image"),
    ("a.json", '[{"prompt": "a", "image": "b.png"}]', "a.json: .*b.png: no such image"),
    ("a.csv", "prompt,image\na,\n", 'line 2 has no "image"; the preset'),
    ("a.jsonl", '{"prompt": "a", "image": "good.png"}\n\n{"prompt": "a"}',
     'line 3 has no "image"; the preset\'s model starts from one'),
    ("a.jsonl", '{"prompt": "a", "image": "good.png"}\n\n{"prompt": "a", "image": "bad.png"}',
     "a.jsonl: .*bad.png cannot be read as an image"),
    ("a.txt", "a dog", 'line 1 has no "image"; .* starts from one: give lines {"prompt"')])
def test_a_missing_or_broken_image_is_reported_with_the_prompt_file(tmp_path, name, content,
                                                                    message):
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, content), images=True)


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompts.txt: no such prompt file"):
        read_prompts(tmp_path / "prompts.txt")
