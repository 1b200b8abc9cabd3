"""``esper watch``: what its server answers, and what a browser makes of it."""

import http.client
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from command_line import refusal
from nissa_sample import EPOCH, sample_record

from esper.nissa.journal import FINAL_RECORD, JOURNAL, Journal
from esper.nissa.record import RunRecorder
from esper.nissa.watch import WatchServer

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def server(tmp_path):
    with WatchServer(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def begin(folder, *epochs):
    recorder = RunRecorder(
        "live", network="4-2", command="train", seed=1, machine="here", torch_version="2.13"
    )
    with Journal(recorder, folder):
        for epoch in epochs:
            recorder.add_epoch(epoch)


def test_the_page_is_the_report_as_of_now(server, tmp_path):
    _, waiting = ask(server)
    assert f"<b>{tmp_path.name}</b>: waiting for the run to begin" in waiting
    begin(tmp_path, EPOCH)
    _, live = ask(server)
    assert "the network 4-2 has trained for 1 epoch" in live
    assert 'data-state="live"' in live
    (tmp_path / FINAL_RECORD).write_text(sample_record().to_json())
    _, final = ask(server)
    assert 'data-state="final"' in final
    assert "<b>digits</b>" in final


def test_nothing_new_is_a_304(server, tmp_path):
    begin(tmp_path, EPOCH)
    first, _ = ask(server)
    again, body = ask(server, If_None_Match=first.getheader("ETag"))
    assert (again.status, body) == (304, "")
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('{"Clock": {"duration_s": 77.0}}\n')
    later, body = ask(server, If_None_Match=first.getheader("ETag"))
    assert later.status == 200
    assert "1 min 17 s" in body


def test_pages_from_elsewhere_cannot_look_in(server):
    answer, body = ask(server, Host="evil.example:80")
    assert answer.status == 403
    assert "waiting" not in body
    assert server.server_address[0] == "127.0.0.1"
    answer, _ = ask(server)
    assert "default-src 'none'" in answer.getheader("Content-Security-Policy")


@pytest.mark.parametrize("path", ["/../pyproject.toml", "/run.json", "/?"])
def test_there_is_no_other_file(server, path):
    assert ask(server, path)[0].status == 404


def test_a_broken_journal_is_an_error_with_its_reason(server, tmp_path):
    (tmp_path / JOURNAL).write_text('{"StepLoss": {"step": "many"}}\n')
    answer, body = ask(server)
    assert (answer.status, answer.reason) == (500, "the run's record cannot be read")
    assert "step" in body


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    assert "none: there is no such folder" in refusal(["watch", str(tmp_path / "none")], capsys)


def test_a_port_that_is_taken_is_one_line(server, tmp_path, capsys):
    port = str(server.server_port)
    said = refusal(["watch", str(tmp_path), "--port", port], capsys)
    assert f"port {port} of this machine cannot" in said


def test_ctrl_c_ends_the_command(tmp_path):
    command = [sys.executable, "-m", "esper", "watch", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="neither Chromium nor Chrome is installed")
def test_a_browser_follows_the_run_to_its_end(server, tmp_path, monkeypatch):
    """The run moves on with each page that is asked for, so that no clock decides."""
    pages = 0
    render = server.page
    moves = {
        3: lambda: begin(tmp_path, EPOCH),
        5: lambda: (tmp_path / FINAL_RECORD).write_text(sample_record().to_json()),
    }

    def page():
        nonlocal pages
        pages += 1
        moves.get(pages, lambda: None)()
        return render()

    monkeypatch.setattr(server, "page", page)
    dom = browse(server.url, tmp_path / "profile")
    assert 'data-state="final"' in dom
    assert "<b>digits</b>" in dom
    assert '<span class="pill " id="status">finished</span>' in dom
    assert "--page: #16191c" in dom  # the report's style has replaced that of the waiting page
    assert pages == 5  # then it stops asking


def browse(url, profile):
    """Return the document after a minute of the page's own, virtual, time."""
    command = [CHROMIUM, "--headless", "--disable-gpu", "--no-first-run", "--dump-dom"]
    command += ["--virtual-time-budget=60000", f"--user-data-dir={profile}", url]
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # chromium's own refuses root
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout
