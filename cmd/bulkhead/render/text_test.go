// SPDX-License-Identifier: Apache-2.0

package render

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
)

func TestForms(t *testing.T) {
	for _, test := range []struct{ got, want string }{
		{CPU(0), "0"}, {CPU(500), "0.5"}, {CPU(125), "0.125"}, {CPU(2000), "2"}, {CPU(10000), "10"},
		{Size(int64(0)), "0B"}, {Size(int64(256 << 20)), "256MiB"}, {Size(int64(3 << 29)), "1.5GiB"}, {Size(uint64(1000)), "1000B"},
		{Duration(0), "0s"}, {Duration(250), "250ms"}, {Duration(60_000), "1m"}, {Duration(3_600_000), "1h"},
		{Duration(5_400_000), "1h30m"}, {Duration(3_601_000), "1h0m1s"}, {Duration(10_000), "10s"},
		{Time(0), "-"}, {Time(1_793_613_600_999_999_999), "2026-11-02T10:00:00Z"},
		{Command([]string{"sh", "-c", "echo 'x'", ""}), `sh -c 'echo '\''x'\''' ''`},
		{Clean("plain ünïcode"), "plain ünïcode"}, {Clean("a\tb\nc\x1b]0;x\a"), `a\tb\nc\x1b]0;x\a`}, {Clean("\u202e\xff"), `\u202e\ufffd`},
		{Quantity("pids", 7), "7"}, {Resource("pids"), "processes"}, {Resource("gpu_slices"), "gpu slices"},
	} {
		if test.got != test.want {
			t.Errorf("got %q, want %q", test.got, test.want)
		}
	}
}

// Every state and every reason has words.
func TestStatesHaveWords(t *testing.T) {
	for n, name := range sandboxv1.ExitReason_name {
		s := &sandboxv1.Sandbox{State: sandboxv1.State_STATE_STOPPED, Exit: &sandboxv1.Exit{Reason: sandboxv1.ExitReason(n), Code: 3, Signal: 9}}
		if got := State(s); !strings.HasPrefix(got, "stopped") || n != 0 && got == "stopped" {
			t.Errorf("%s: state %q", name, got)
		}
		if got := Ending(s); (got == "") != (s.Exit.Reason == sandboxv1.ExitReason_EXIT_REASON_EXITED) {
			t.Errorf("%s: ending %q", name, got)
		}
	}
	for n, name := range sandboxv1.State_name {
		if got := State(&sandboxv1.Sandbox{State: sandboxv1.State(n)}); got == "" || strings.ToLower(got) != got {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("x\x1b[2J\r\n\u2028")
	f.Fuzz(func(t *testing.T, s string) {
		out := Clean(s)
		if !utf8.ValidString(out) || strings.IndexFunc(out, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 {
			t.Errorf("%q became %q", s, out)
		}
		if Clean(out) != out {
			t.Errorf("%q is not stable", out)
		}
	})
}
