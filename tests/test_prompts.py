"""Prompt files: each form read right, or refused by name."""

import json

import pytest

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
    ("a.json", json.dumps([A, B])), ("a.json", json.dumps([A, B], indent=2)),
    ("a.txt", json.dumps([A, B], indent=2)), ("a.jsonl", json.dumps([A, B])),
    ("a.json", "\ufeff\r\n" + json.dumps(INFO, indent=1).replace("\n", "\r\n")),
    ("a.json", json.dumps({"version": 1, "by": {"prompts": 3}, "prompts": [A, {"text": B}]})),
    ("a.txt", json.dumps({"data": INFO})),
    ("a.jsonl", f'{{"prompt": {json.dumps(A)}, "score": NaN}}\n\n{{"caption": "say \\"hi\\""}}\n'),
    ("a.jsonl", "".join(json.dumps(x) + "\r\n" for x in INFO)),
    ("a.txt", "".join(json.dumps(x) + "\n" for x in INFO)),
    ("a.json", "".join(json.dumps(x) + "\n" for x in INFO)),
    ("a.ndjson", f"{json.dumps(A)}\n{json.dumps(B)}"),
    ("a.jsonl", '{"Prompt": "a red disc, moving", "caption": null, "image": ""}\n'
                '{"text": " say \\"hi\\" "}'),
    ("a.csv", f'id,prompt,id\n1,"{A}",x\n,,\n2,"say ""hi""",\n'),
    ("a.csv", f'\ufeff"Prompt"\r\n"{A}"\r\n\r\n"say ""hi"""\r\n'),
    ("a.csv", f'caption;seed\n{A};1\n"say ""hi""";2\n'),
    ("a.csv", f'caption\tseed\n{A}\t1\n"say ""hi"""\t2\n'),
    ("a.tsv", f"caption\tid\n{A}\t1\nsay \"hi\"\t2\n"),
    ("a.txt", f"id\tcaption\n1\t{A}\n2\tsay \"hi\"\n"),
    ("a.txt", f'id,prompt\n1,"{A}"\n2,"say ""hi"""\n'),
    ("a.data", f'prompt, image\n"{A}",\n"say ""hi""",\n')])
def test_each_form_gives_the_same_prompts(tmp_path, name, content):
    assert read_prompts(write(tmp_path, name, content)) == [Prompt(A), Prompt(B)]


@pytest.mark.parametrize("line", [
    "[cinematic] a dog", "[[cinematic]] a dog", "{red|blue} dog", '"Stop", says a sign', '"a dog"',
    '["Stop" sign] a road', '["Hello", it says] a dog', "['90s style] a dog", "--seed 3",
    "../../etc/passwd", "prompts.csv", "# a hash", "<b>$x^2$ {0} %s", "a,b\tc;d", "[0:05] a dog",
    "text, in neon", "a caption; a prompt", "'tis a dog", "null", "3", "a\u2028b\u0085c\x0bd\re"])
def test_a_line_of_text_is_a_prompt_whatever_it_looks_like(tmp_path, line):
    for content, wanted in ((line, [line]), (f"{line}\na cat\n", [line, "a cat"]),
                            (f"a cat\n{line}\n", ["a cat", line])):
        got = read_prompts(write(tmp_path, "a.txt", content))
        assert got == [Prompt(text) for text in wanted]


def test_prompts_keep_what_their_form_lets_them_hold(tmp_path):
    table = write(tmp_path, "a.csv", 'prompt,n\r\n"two\r\nlines, ""quoted""",1\r\n🦊 über,2\r\n')
    assert read_prompts(table) == [Prompt('two\nlines, "quoted"'), Prompt("🦊 über")]
    pair = write(tmp_path, "a.jsonl", '{"prompt": "\\ud83e\\udd8a\\n[a]"}')
    assert read_prompts(pair) == [Prompt("🦊\n[a]")]
    assert read_prompts(write(tmp_path, "a.jsonl", '"a"')) == [Prompt("a")]


@pytest.mark.parametrize("name, content, fault", [
    # JSON that is none, wherever it stands
    ("a.json", "[\n1,\n}", r"line 3 is not JSON .*repair it"),
    ("a.json", "a dog", "line 1 is not JSON"),
    ("a.txt", '[\n "a",\n "b",\n]', "line 4 is not JSON"),
    ("a.txt", '["a", "b"', "line 1 is not JSON"), ("a.txt", "['a', 'b']", "line 1 is not JSON"),
    ("a.txt", "{'prompt': 'a'}", "line 1 is not JSON"),
    ("a.txt", '{"prompt": "a"},\n{"prompt": "b"}', "line 1 is not JSON"),
    ("a.txt", '{\n"prompt": "a"}\n{"prompt": "b"}', "line 3 is not JSON"),
    ("a.txt", "[" * 100_000, "line 1 is not JSON"), ("a.json", "[" * 100_000 + "]" * 100_000,
                                                     "line 1 is not JSON .*recursion"),
    ("a.txt", 'a dog\n{"prompt": "a"}', 'line 2: got {"prompt": "a"}, which looks like JSON'),
    ("a.txt", '// mine\n[\n"a"]', r"line 2: got \[, which looks like JSON"),
    ("a.jsonl", '{"prompt": "a"}\na dog', "line 2 is not JSON"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}', '2 .*key "prompt" is there tw'),
    ("a.json", '["a",\n{"prompt": "b", "prompt": "c"}]', 'line 2 .*key "prompt" is there twice'),
    # JSON of another shape
    ("a.json", '"a dog"', 'line 1: got "a dog"; wanted a JSON list'),
    ("a.json", '[["a", "b"]]', r'line 1, entry 1: got \["a", "b"\]; wanted {"prompt"'),
    ("a.json", '["a",\n 3]', "line 2, entry 2: got 3; wanted"),
    ("a.json", '["a", ""]', 'line 1, entry 2: got ""; wanted'),
    ("a.json", '{"p": ["a"],\n"q":\n["b"]}', 'got a JSON object of "p", "q"; wanted one list'),
    ("a.json", '{"p": ["a"], "p": ["b"]}', 'got a JSON object of "p", "p"; wanted one list'),
    ("a.json", '{"1": {"prompt": "a"}}', 'got a JSON object of "1"; wanted one list'),
    ("a.json", '{"text": "of dogs", "items": ["a"]}', 'got a JSON object of "text", "items"'),
    ("a.json", "{}", "got a JSON object of nothing"), ("a.json", "[]", "got an empty prompt file"),
    ("a.json", '{"prompts":\n[{"prompt": NaN}]}', "line 2, entry 1: got .*NaN.*; wanted"),
    ("a.json", '["\\ud800 a"]', "line 1, entry 1 is not JSON of UTF-8 text"),
    ("a.jsonl", '{"prompt": "a\\u0000"}', "line 1 is not JSON of UTF-8 text .*NUL"),
    ("a.jsonl", '{"prompt": "a", "caption": "b"}', "line 1: got .*wanted one prompt, and one im"),
    ("a.jsonl", '{"prompt": " "}', "line 1: got .*wanted {"),
    ("a.jsonl", '{"prompt_cn": "a"}', "line 1: got .*wanted {"),
    # tables
    ("a.csv", "a dog\na cat", "line 1: got a header of a dog; wanted one of prompt, prompt_en"),
    ("a.csv", "\nprompt,caption\na,b", "line 2: got a header of prompt, caption; wanted one of"),
    ("a.csv", "prompt,Prompt\na,b", "line 1: got a header of prompt, Prompt; wanted one of"),
    ("a.csv", "prompt,image,image_path\na,b,c", "wanted one of image, image_path in it, once"),
    ("a.csv", 'prompt\n"a\nb"\na dog, running', "line 4: got 2 cells; wanted 1.*quotes"),
    ("a.csv", "prompt,id\na", "line 2: got 1 cells; wanted 2"),
    ("a.csv", 'id,prompt\n1,a\n2,\n', 'line 3: got {"prompt": ""}; wanted'),
    ("a.csv", 'prompt\na\n"b" c\n', "line 3 is no row of a table"),
    ("a.csv", 'prompt\na\n"b\n', "line 3 is no row of a table"),
    ("a.csv", "prompt\n\n", "got an empty prompt file"),
    ("a.txt", "Prompt\na dog", "line 1: got Prompt, as the header of a table.*rename the file"),
    # other files
    ("a.yaml", "prompts:\n- a dog", "got a .yaml file; wanted prompts as .txt"),
    ("a.txt", "a dog\nb".encode("utf-16"), "line 1 is not UTF-8"),
    ("a.txt", "a dog\nb".encode("utf-16-le"), r"line 1 is not UTF-8 \(a NUL byte at its byte 2\)"),
    ("a.csv", b"prompt\n\xe9", "line 2 is not UTF-8 .* byte 1")])
def test_what_is_not_read_is_refused_by_file_and_line(tmp_path, name, content, fault):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=fault) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 500 + len(str(path))


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"prompt": "a", "image_path": "x/b.png"}'), ("a.csv", "prompt,image\na,x/b.png\n"),
    ("a.json", '[{"caption": "a", "image": "x/b.png", "id": 1}]'),
    ("a.txt", "image_path\ttext\nx/b.png\ta\n")])
def test_images_are_relative_to_the_file_in_every_form(tmp_path, monkeypatch, name, content):
    monkeypatch.setenv("RANK", "1")  # another rank decodes them
    path = write(tmp_path, name, content)
    assert read_prompts(path, images=True) == [Prompt("a", tmp_path / "x/b.png")]
    with pytest.raises(ValueError, match='line [12].* has an "image"; the preset.s model takes'):
        read_prompts(path)


def test_a_missing_image_is_named_with_its_place_in_every_form(tmp_path):
    for name, content, place in (("a.csv", "prompt,image\na,b.png\n", "line 2"),
                                 ("a.json", '[{"prompt": "a", "image": "b.png"}]',
                                  "line 1, entry 1")):
        with pytest.raises(ValueError, match=f"{name}: {place}: .*b.png: no such image"):
            read_prompts(write(tmp_path, name, content), images=True)
    with pytest.raises(ValueError, match='line 2 has no "image"; the preset'):
        read_prompts(write(tmp_path, "a.csv", "prompt,image\na,\n"), images=True)
