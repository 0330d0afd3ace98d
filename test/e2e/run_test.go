// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestHelloWorld(t *testing.T) {
	n := open(t)
	r := n.do("run", "--rm", "--tenant", "acme", busybox, "echo", "hello world")
	if r != (result{out: "hello world\n"}) {
		t.Errorf("got %s", r)
	}
	eventually(t, "the record of a --rm sandbox is gone", func() bool { return n.must("ls", "-aq") == "" })
}

func TestExitCodes(t *testing.T) {
	n := open(t)
	for _, c := range []struct {
		command string
		code    int
		reason  string
	}{
		{"exit 0", 0, "EXITED"},
		{"exit 7", 7, "EXITED"},
		{"exit 255", 255, "EXITED"},
		{"exit 137", 137, "SIGNALED"}, // indistinguishable, and said so in the documentation
	} {
		name := fmt.Sprintf("code-%d", c.code)
		r := n.do("run", "--name", name, "--tenant", "acme", busybox, "sh", "-c", c.command)
		if r.code != c.code || r.out != "" || r.err != "" && c.code != 137 {
			t.Errorf("%s: got %s", c.command, r)
		}
		if rec := n.get(name); rec.Sandbox.Exit.Code != c.code || !strings.Contains(rec.Sandbox.Exit.Reason, c.reason) {
			t.Errorf("%s: the record says %+v", c.command, rec.Sandbox.Exit)
		}
		if got := n.must("wait", name); got != fmt.Sprint(c.code) {
			t.Errorf("wait prints %q, want %d", got, c.code)
		}
	}
	// Killed from outside, as an operator might.
	rec := n.start("victim", "acme", busybox)
	if err := kill(rec.Sandbox.Pid); err != nil {
		t.Fatal(err)
	}
	if got := n.must("wait", "victim"); got != "137" {
		t.Errorf("wait for a killed sandbox prints %q", got)
	}
	if x := n.get("victim").Sandbox.Exit; !strings.Contains(x.Reason, "SIGNALED") || !strings.Contains(x.Message, "signal 9") {
		t.Errorf("a stranger's KILL is recorded as %+v", x)
	}
}

func TestCommandThatIsNotThere(t *testing.T) {
	n := open(t)
	n.refuse(1, []string{"nosuch"}, "run", "--name", "x", "--tenant", "acme", busybox, "nosuch")
	if rec := n.get("x"); !strings.Contains(rec.Sandbox.Exit.Reason, "LAUNCH_FAILED") {
		t.Errorf("got %+v", rec.Sandbox.Exit)
	}
}

// TestOutputIsByteExact: what the command writes comes out, nothing else, and
// in the log afterwards as well.
func TestOutputIsByteExact(t *testing.T) {
	n := open(t)
	r := n.do("run", "--name", "both", "--tenant", "acme", busybox, "sh", "-c", `printf 'out\000\377 1\r\n\n'; printf 'err 1\n' >&2; printf 'no newline'; printf 'nor here' >&2`)
	wantOut, wantErr := "out\x00\xff 1\r\n\nno newline", "err 1\nnor here"
	if r.out != wantOut || r.err != wantErr || r.code != 0 {
		t.Errorf("got %q and %q, exit %d; want %q and %q", r.out, r.err, r.code, wantOut, wantErr)
	}
	if l := n.do("logs", "both"); l.out != wantOut || l.err != wantErr {
		t.Errorf("logs: got %q and %q, want %q and %q", l.out, l.err, wantOut, wantErr)
	}
	if l := n.do("logs", "--stderr", "both"); l.out != wantErr || l.err != "" {
		t.Errorf("logs --stderr: got %q and %q", l.out, l.err)
	}
	if l := n.do("logs", "--tail", "1", "both"); !strings.Contains(l.out+l.err, "nor here") && !strings.Contains(l.out+l.err, "no newline") {
		t.Errorf("logs --tail 1: got %q and %q", l.out, l.err)
	}
}

func TestBigOutput(t *testing.T) {
	n := open(t)
	var want bytes.Buffer // 10 MiB
	for i := range 10 << 20 / 64 {
		fmt.Fprintf(&want, "%063d\n", i)
	}
	const command = `BEGIN { for (i = 0; i < 163840; i++) printf "%063d\n", i }`
	r := n.do("run", "--name", "big", "--tenant", "acme", "--cpus", "2", busybox, "awk", command)
	if r.code != 0 || r.out != want.String() {
		t.Errorf("exit %d; got %d bytes, want %d: %s", r.code, len(r.out), want.Len(), r.err)
	}
	if l := n.do("logs", "big"); l.out != want.String() {
		t.Errorf("logs: got %d bytes, want %d", len(l.out), want.Len())
	}
	if l := n.do("logs", "--tail", "2", "big"); l.out != want.String()[want.Len()-128:] {
		t.Errorf("logs --tail 2: got %q", l.out)
	}
	// One line of ten million bytes, as some programs write.
	r = n.do("run", "--rm", "--tenant", "acme", "--cpus", "2", busybox, "sh", "-c", "head -c 10485760 /dev/zero | tr '\\0' x")
	if r.code != 0 || len(r.out) != 10<<20 || strings.Trim(r.out, "x") != "" {
		t.Errorf("exit %d; one line of 10 MiB came as %d bytes: %s", r.code, len(r.out), r.err)
	}
}

// TestOutputIsWholeOrSaidNotToBe: what comes faster than this program reads and
// outgrows the log in that time is lost, since nothing may hold up the command.
// That is said.
func TestOutputIsWholeOrSaidNotToBe(t *testing.T) {
	n := open(t)
	r := n.do("run", "--rm", "--tenant", "acme", "--cpus", "2", busybox, "seq", "1", "3000000")
	lines := strings.Count(r.out, "\n")
	if said := strings.Contains(r.err, "rotated away before it was read"); r.code != 0 || (lines == 3000000) == said {
		t.Errorf("exit %d, %d lines, %.300q", r.code, lines, r.err)
	}
	if !strings.HasSuffix(r.out, "\n3000000\n") {
		t.Errorf("the end is missing: %q", r.out[max(0, len(r.out)-50):])
	}
}

// TestLongOutputIsBounded: of a log that outgrows its bound the end is kept.
func TestLongOutputIsBounded(t *testing.T) {
	n := open(t)
	n.must("run", "-d", "--name", "long", "--tenant", "acme", "--cpus", "2", busybox, "sh", "-c", "seq 1 2000000; echo the end")
	n.must("wait", "long")
	l := n.do("logs", "long")
	if !strings.HasSuffix(l.out, "\n1999999\n2000000\nthe end\n") || len(l.out) > 12<<20 || len(l.out) < 4<<20 {
		t.Errorf("%d bytes are kept, ending %q", len(l.out), l.out[max(0, len(l.out)-50):])
	}
	var kept int64
	files, err := os.ReadDir(filepath.Join(n.Dir, "state", "logs", n.get("long").Sandbox.ID))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if info, err := f.Info(); err == nil {
			kept += info.Size()
		}
	}
	if kept > 5*10<<20 {
		t.Errorf("the log takes %d bytes, more than five files of 10 MiB", kept)
	}
}

func TestLifecycle(t *testing.T) {
	n := open(t)
	id := n.must("run", "-d", "--name", "life", "--tenant", "acme/vision", busybox, "sh", "-c", "trap 'echo bye; exit 4' TERM; echo hi; while :; do sleep 0.1; done")
	if len(id) != 12 {
		t.Errorf("run -d prints %q, want an id", id)
	}
	ls := n.must("ls")
	for _, want := range []string{"life", "acme/vision", "running", id} {
		if !strings.Contains(strings.ToLower(ls), want) {
			t.Errorf("ls does not show %q:\n%s", want, ls)
		}
	}
	for _, ref := range []string{id, id[:5], "life", "acme/vision:life"} {
		if rec := n.get(ref); rec.Sandbox.ID != id {
			t.Errorf("get %s answers %s, want %s", ref, rec.Sandbox.ID, id)
		}
	}
	if got := n.must("ls", "-q", "--tenant", "globex"); got != "" {
		t.Errorf("ls of another tenant shows %q", got)
	}
	n.refuse(1, []string{"life"}, "run", "--name", "life", "--tenant", "acme/vision", busybox, "true")
	n.refuse(1, []string{"life"}, "rm", "life")
	eventually(t, "logs of a running sandbox", func() bool { return n.must("logs", "life") == "hi" })

	waited := make(chan string, 1)
	go func() {
		out, _ := n.Command(context.Background(), "wait", "life").Output()
		waited <- string(out)
	}()
	time.Sleep(200 * time.Millisecond)
	n.must("stop", "life")
	if got := <-waited; got != "4\n" {
		t.Errorf("wait prints %q, want 4", got)
	}
	rec := n.get("life")
	if rec.Sandbox.Exit.Code != 4 || !strings.Contains(rec.Sandbox.Exit.Reason, "STOPPED") || rec.Sandbox.Exit.By != "uid:0" {
		t.Errorf("the record says %+v", rec.Sandbox.Exit)
	}
	if got := n.must("logs", "life"); got != "hi\nbye" {
		t.Errorf("logs after stop: %q", got)
	}
	n.must("stop", "life") // no error
	if got := n.must("ls", "-q"); got != "" {
		t.Errorf("ls shows a stopped sandbox: %q", got)
	}
	if got := n.must("ls", "-aq"); got != id {
		t.Errorf("ls -aq shows %q", got)
	}
	n.must("rm", "life")
	n.refuse(1, []string{"life"}, "get", "life")
	n.refuse(1, []string{"life"}, "logs", "life")
}

// TestStopKills: what ignores TERM is killed after the grace, and what cannot
// hear it at once.
func TestStopKills(t *testing.T) {
	n := open(t)
	n.must("run", "-d", "--name", "deaf", "--tenant", "acme", busybox, "sh", "-c", "trap 'echo no' TERM; echo up; while :; do sleep 0.1; done")
	eventually(t, "it is up", func() bool { return n.must("logs", "deaf") == "up" })
	began := time.Now()
	n.must("stop", "--grace", "1s", "deaf")
	if d := time.Since(began); d < time.Second || d > 5*time.Second {
		t.Errorf("stop --grace 1s took %s", d)
	}
	if x := n.get("deaf").Sandbox.Exit; x.Code != 137 || !strings.Contains(x.Reason, "STOPPED") {
		t.Errorf("got %+v", x)
	}
	n.start("unhandled", "acme", busybox)
	began = time.Now()
	n.must("stop", "unhandled")
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("stop of a command that cannot get TERM took %s", d)
	}
	n.start("killed", "acme", busybox)
	n.must("kill", "killed")
	if x := n.get("killed").Sandbox.Exit; x.Code != 137 || !strings.Contains(x.Reason, "STOPPED") {
		t.Errorf("kill: got %+v", x)
	}
}

func TestExec(t *testing.T) {
	n := open(t)
	n.start("box", "acme", busybox, "-e", "FROM=sandbox", "-w", "/tmp")
	if r := n.do("exec", "box", "sh", "-c", "pwd; echo $FROM; echo oops >&2; exit 9"); r != (result{out: "/tmp\nsandbox\n", err: "oops\n", code: 9}) {
		t.Errorf("got %s", r)
	}
	if r := n.do("exec", "-e", "A=b", "-w", "/etc", "box", "sh", "-c", "pwd; echo $A"); r.out != "/etc\nb\n" {
		t.Errorf("got %s", r)
	}
	in := strings.Repeat("0123456789abcdef\n", 100_000)
	if r := n.feed(strings.NewReader(in), "exec", "-i", "box", "cat"); r.out != in || r.code != 0 {
		t.Errorf("exec -i cat: exit %d, %d of %d bytes came back: %s", r.code, len(r.out), len(in), r.err)
	}
	if r := n.feed(strings.NewReader("one line"), "exec", "-i", "box", "wc", "-c"); strings.TrimSpace(r.out) != "8" {
		t.Errorf("exec -i wc -c: got %s", r)
	}
	if r := n.do("exec", "box", "cat"); r.out != "" || r.code != 0 {
		t.Errorf("exec without -i has an empty input: got %s", r)
	}
	n.refuse(1, []string{"nosuch"}, "exec", "box", "nosuch")
	n.must("stop", "box")
	n.refuse(1, []string{"box"}, "exec", "box", "true")
}

func TestInteractive(t *testing.T) {
	n := open(t)
	in := "hello\nworld\n"
	if r := n.feed(strings.NewReader(in), "run", "-i", "--rm", "--tenant", "acme", busybox, "cat"); r.out != in || r.code != 0 {
		t.Errorf("run -i cat: got %s", r)
	}
	big := strings.Repeat("0123456789abcdef\n", 200_000)
	if r := n.feed(strings.NewReader(big), "run", "-i", "--rm", "--tenant", "acme", "--cpus", "2", busybox, "md5sum"); !strings.HasPrefix(r.out, md5sum(big)) {
		t.Errorf("run -i md5sum: got %s, want %s", r, md5sum(big))
	}
	// A command that ends before anyone could attach.
	for range 3 {
		if r := n.feed(strings.NewReader(""), "run", "-i", "--rm", "--tenant", "acme", busybox, "sh", "-c", "echo quick; exit 3"); r.out != "quick\n" || r.code != 3 {
			t.Errorf("run -i of a quick command: got %s", r)
		}
	}
}

func TestTerminals(t *testing.T) {
	n := open(t)
	n.start("box", "acme", busybox)
	tty := n.terminal(30, 100, "exec", "-it", "box", "sh")
	tty.write("stty size; tty; exit 5\n")
	out, code := tty.end()
	if code != 5 || !strings.Contains(out, "30 100") || !strings.Contains(out, "/dev/pts/") {
		t.Errorf("exec -it: exit %d, %q", code, out)
	}
	tty = n.terminal(40, 120, "run", "-it", "--name", "term", "--tenant", "acme", busybox, "sh")
	tty.write("stty size; echo $TERM\n")
	tty.await("40 120")
	tty.resize(50, 90)
	tty.write("sleep 0.3; stty size\n")
	tty.await("50 90")
	tty.write("sleep 100\n")
	time.Sleep(300 * time.Millisecond)
	tty.write("\x03") // ^C is the sandbox's, not ours
	tty.write("echo interrupted; exit 6\n")
	out, code = tty.end()
	if code != 6 || !strings.Contains(out, "xterm") || !strings.Contains(out, "interrupted\r\n") {
		t.Errorf("run -it: exit %d, %q", code, out)
	}
	if got := n.must("logs", "term"); !strings.Contains(got, "50 90") {
		t.Errorf("log of a terminal: %q", got)
	}
}

func TestInsideItIsAsAsked(t *testing.T) {
	n := open(t)
	out := n.must("run", "--rm", "--name", "asked", "--tenant", "acme", "-e", "A=1", "-e", "B=two words", "-w", "/usr", "-u", "1234:567",
		busybox, "sh", "-c", `pwd; echo $A $B; id -u; id -g; hostname; touch /etc/x 2>/dev/null && echo writable || echo closed`)
	if want := "/usr\n1 two words\n1234\n567\nasked\nclosed"; out != want {
		t.Errorf("got %q, want %q", out, want)
	}
	n.refuse(1, []string{"nobody-there"}, "run", "--tenant", "acme", "-u", "nobody-there", busybox, "true")
}

func TestSignalsOfRun(t *testing.T) {
	n := open(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := n.Command(ctx, "run", "--name", "fg", "--tenant", "acme", busybox, "sh", "-c", "trap 'echo got TERM; exit 8' TERM; echo up; while :; do sleep 0.1; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 3)
	if _, err := io.ReadFull(out, buf); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(out)
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 8 || string(rest) != "got TERM\n" {
		t.Errorf("after INT: exit %d, %q", code, rest)
	}
}
