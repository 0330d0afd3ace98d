// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

var update = flag.Bool("update", false, "rewrite the expected output in testdata")

// A story is a file of lines, told to one fresh node:
//
//	# remark
//	@ something that happens on the node, see happen
//	< one line of standard input of the next command
//	$ a command line; 'quotes' hold words together
//	| what it must write to standard output
//	! what it must write to standard error
//	= its exit code, if that is not 0
//
// go test -update writes the |, ! and = lines anew.
func TestStories(t *testing.T) {
	files, err := filepath.Glob("testdata/story/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := tell(t, string(want))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got, -update accepts it):\n%s", file, diff)
			}
		})
	}
}

// tell runs the story and answers it as it really went.
func tell(t *testing.T, story string) string {
	t.Helper()
	f := newFakeNode(t)
	g := newFakeGateway(t)
	t.Setenv("BULKHEAD_SOCKET", f.sock)
	t.Setenv("BULKHEAD_TENANT", "")
	t.Setenv("GATEWAY", "unix://"+g)
	same := strings.NewReplacer(f.sock, "/run/agent.sock", g, "/run/gateway.sock", runtime.GOOS+"/"+runtime.GOARCH, "OS/ARCH")
	var out strings.Builder
	var stdin bytes.Buffer
	for line := range strings.Lines(story) {
		line = strings.TrimSuffix(line, "\n")
		kind, rest, _ := strings.Cut(line, " ")
		switch kind {
		case "|", "!", "=":
			continue
		case "@":
			f.happen(t, rest)
		case "<":
			stdin.WriteString(rest + "\n")
		}
		out.WriteString(line + "\n")
		if kind != "$" {
			continue
		}
		var stdout, stderr bytes.Buffer
		code := run(words(os.ExpandEnv(rest)), bytes.NewReader(bytes.Clone(stdin.Bytes())), &stdout, &stderr)
		stdin.Reset()
		prefix(&out, "| ", same.Replace(stdout.String()))
		prefix(&out, "! ", same.Replace(stderr.String()))
		if code != 0 {
			fmt.Fprintf(&out, "= %d\n", code)
		}
	}
	return out.String()
}

func prefix(out *strings.Builder, mark, text string) {
	for line := range strings.Lines(text) {
		out.WriteString(strings.TrimRight(mark+line, " \n"))
		if !strings.HasSuffix(line, "\n") {
			out.WriteString("<no newline>")
		}
		out.WriteString("\n")
	}
}

// words splits at blanks outside of single quotes.
func words(s string) []string {
	var out []string
	var cur strings.Builder
	quoted, any := false, false
	for _, r := range s {
		switch {
		case r == '\'':
			quoted, any = !quoted, true
		case r == ' ' && !quoted:
			if any {
				out = append(out, cur.String())
			}
			cur.Reset()
			any = false
		default:
			cur.WriteRune(r)
			any = true
		}
	}
	if any {
		out = append(out, cur.String())
	}
	return out
}

// happen does something to the node or to the environment.
func (f *fakeNode) happen(t *testing.T, what string) {
	t.Helper()
	verb, arg, _ := strings.Cut(what, " ")
	switch verb {
	case "env":
		k, v, _ := strings.Cut(arg, "=")
		t.Setenv(k, v)
	case "halt":
		f.halt()
	case "start":
		f.start()
	case "stopped":
		f.mu.Lock()
		b, err := f.find(arg)
		f.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.stopped(context.Background(), b); err != nil {
			t.Fatal(err)
		}
	case "wrote": // its first line
		f.eventually(arg+" to write", func() bool {
			b, err := f.find(arg)
			return err == nil && len(b.log) > 0
		})
	case "gone":
		f.until(context.Background(), func() bool { _, err := f.find(arg); return err != nil })
	case "degraded", "audit", "blocked", "flow":
		f.egress(t, verb, arg)
	case "notenforced":
		f.info.NotEnforced = append(f.info.NotEnforced, arg)
	case "warning":
		f.info.Warnings = append(f.info.Warnings, arg)
	case "version":
		f.info.Version = arg
	case "spool":
		switch arg {
		case "none":
			f.info.Spool = &nodev1.Spool{LastSeq: 7, Bytes: 700, LimitBytes: 256 << 20, State: "none"}
		case "full":
			f.info.Spool.State, f.info.Spool.LastError = "full", "dial tcp 192.0.2.9:7443: connection refused"
			f.info.Spool.Bytes = f.info.Spool.LimitBytes
		}
	case "message":
		ref, text, _ := strings.Cut(arg, " ")
		b, err := f.find(ref)
		if err != nil {
			t.Fatal(err)
		}
		text, err = strconv.Unquote(text)
		if err != nil {
			t.Fatal(err)
		}
		b.events = append(b.events, &nodev1.Event{TimeNs: f.tick(), Kind: "policy", Message: text})
	default:
		t.Fatalf("nothing like %q happens", what)
	}
}
