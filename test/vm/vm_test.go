// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/need"
)

func TestParseResult(t *testing.T) {
	for _, tt := range []struct {
		line string
		code int
		ok   bool
	}{
		{resultLine("NONCE", 0), 0, true},
		{resultLine("NONCE", 3) + "\r\n", 3, true},
		{"[    2.1] a kernel message " + resultLine("NONCE", 1), 1, true},
		{resultLine("OTHER", 0), 0, false},
		{resultPrefix + "NONCE x", 0, false},
		{"PASS", 0, false},
	} {
		code, ok := parseResult(tt.line, "NONCE")
		if code != tt.code || ok != tt.ok {
			t.Errorf("parseResult(%q) = %d, %v, want %d, %v", tt.line, code, ok, tt.code, tt.ok)
		}
	}
}

func TestCpioIsReadByCpio(t *testing.T) {
	cpio := need.Program(t, "cpio")
	var archive bytes.Buffer
	files := []cpioFile{
		{name: "dev", mode: typeDir | 0o755},
		{name: "init", mode: typeFile | 0o755, body: []byte("12345")},
		{name: "plan.json", mode: typeFile | 0o644, body: []byte("{}")},
	}
	if err := writeCpio(&archive, files); err != nil {
		t.Fatal(err)
	}
	if len(files) != 3 {
		t.Fatal("writeCpio changed its argument")
	}
	cmd := exec.Command(cpio, "--list", "--verbose", "--quiet", "--format=newc")
	cmd.Stdin = &archive
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var got []string
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		got = append(got, fields[0]+" "+fields[4]+" "+fields[len(fields)-1])
	}
	want := []string{"drwxr-xr-x 0 dev", "-rwxr-xr-x 5 init", "-rw-r--r-- 2 plan.json"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTestSummary(t *testing.T) {
	var sum testSummary
	var console bytes.Buffer
	sum.read(strings.NewReader("=== RUN   TestA\n--- PASS: TestA (0.1s)\n    --- PASS: TestA/sub (0.0s)\n"+
		"=== RUN   TestB\n    b_test.go:1: wrong\n--- FAIL: TestB (0.2s)\n--- SKIP: TestC (0.0s)\nFAIL"), &console)
	if got, want := sum.String(), "1 passed, 1 failed, 1 skipped"; got != want {
		t.Errorf("summary %q, want %q", got, want)
	}
	if got, want := strings.Count(console.String(), "\n"), 3; got != want {
		t.Errorf("console has %d lines, want %d:\n%s", got, want, console.String())
	}
	console.Reset()
	sum.dump(&console)
	if got := console.String(); !strings.Contains(got, "b_test.go:1: wrong") || strings.Contains(got, "=== RUN") {
		t.Errorf("dump:\n%s", got)
	}
}

func TestListen(t *testing.T) {
	ended, cause := "the guest ended without a result", errors.New("out of time")
	for name, tt := range map[string]struct {
		console string
		hang    bool
		code    int
		err     string
	}{
		"passes":       {console: upLine + "\nok\n" + resultLine("N", 0) + "\n"},
		"fails":        {console: upLine + "\n" + resultLine("N", 1) + "\n", code: 1},
		"dies":         {console: upLine + "\npanic\n", code: 1, err: ended},
		"never starts": {console: "SeaBIOS\n", code: 1, err: ended},
		"hangs":        {console: upLine + "\n", hang: true, code: 1, err: cause.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, cause)
			defer cancel()
			var console io.Reader = strings.NewReader(tt.console)
			if tt.hang {
				ctx, cancel = context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
				defer cancel()
				r, w := io.Pipe()
				defer w.Close()
				console = io.MultiReader(console, r)
			}
			var log bytes.Buffer
			code, err := listen(ctx, console, &log, "N", time.Now())
			if code != tt.code {
				t.Errorf("code %d, want %d", code, tt.code)
			}
			if (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			if !strings.Contains(log.String(), strings.SplitN(tt.console, "\n", 2)[0]) {
				t.Errorf("log lacks the console: %q", log.String())
			}
		})
	}
}

func TestSuitesFitTheirTier(t *testing.T) {
	chosen, err := choose([]string{"all"})
	if err != nil {
		t.Fatal(err)
	}
	var total time.Duration
	kernels := map[string]bool{}
	for _, s := range chosen {
		total += s.limit
		if len(s.steps) == 0 {
			t.Errorf("suite %s has no steps", s.name)
		}
		kernels[s.version()] = true
	}
	if !kernels[kernel61] || !kernels[kernel612] {
		t.Errorf("the vm tier boots %v, want both kernels", kernels)
	}
	if limit := 27 * time.Minute; total > limit {
		t.Errorf("the suites of the vm tier may take %v, want at most %v", total, limit)
	}
	if _, err := choose([]string{"nonsense"}); err == nil {
		t.Error("an unknown suite is accepted")
	}
}
