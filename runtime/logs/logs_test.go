// SPDX-License-Identifier: Apache-2.0

package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var noon = time.Date(2026, 11, 24, 12, 0, 0, 7, time.UTC)

func TestLineFormat(t *testing.T) {
	for _, c := range []struct {
		want string
		line Line
	}{
		{"2026-11-24T12:00:00.000000007Z stdout F hello world", Line{Time: noon, Stream: Stdout, Text: []byte("hello world")}},
		{"2026-11-24T12:00:00.000000007Z stderr P piece", Line{Time: noon, Stream: Stderr, Partial: true, Text: []byte("piece")}},
		{"2026-11-24T12:00:00.000000007Z stderr F:notice lost", Line{Time: noon, Stream: Stderr, Notice: true, Text: []byte("lost")}},
		{"2026-11-24T12:00:00.000000007Z stdout F ", Line{Time: noon, Stream: Stdout, Text: []byte{}}},
	} {
		got := AppendLine(nil, c.line)
		if string(got) != c.want+"\n" {
			t.Errorf("got %q, want %q", got, c.want)
		}
		back, err := ParseLine(got)
		if err != nil {
			t.Errorf("%q: %v", got, err)
		}
		if diff := cmp.Diff(c.line, back); diff != "" {
			t.Errorf("%q: %s", got, diff)
		}
	}
}

func TestParseForeignLines(t *testing.T) {
	// containerd's CRI plugin cuts trailing zeros, and kubelet allows more tags.
	l, err := ParseLine([]byte("2016-10-06T00:17:09.66979Z stdout F:more:tags log content"))
	if err != nil || string(l.Text) != "log content" || l.Notice {
		t.Errorf("got %+v, %v", l, err)
	}
	for _, bad := range []string{
		"", "x", "2016-10-06T00:17:09Z", "2016-10-06T00:17:09Z stdout", "yesterday stdout F x",
		"2016-10-06T00:17:09Z stdlog F x", "2016-10-06T00:17:09Z stdout X x", "2016-10-06T00:17:09Z stdout",
	} {
		if l, err := ParseLine([]byte(bad)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: got %+v, %v", bad, l, err)
		}
	}
}

func FuzzParseLine(f *testing.F) {
	f.Add([]byte("2026-11-24T12:00:00.000000007Z stdout F hello"))
	f.Add([]byte("2026-11-24T12:00:00Z stderr P:x a\nb"))
	f.Add([]byte("2026-11-24T12:00:00+23:59 stderr F:notice"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseLine(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if bytes.IndexByte(l.Text, '\n') >= 0 || l.Time.Year() > 9999 || l.Time.UTC().Year() < 0 {
			return // cannot be written
		}
		back, err := ParseLine(AppendLine(nil, l))
		if err != nil {
			t.Fatalf("%q: read back: %v", b, err)
		}
		if !back.Time.Equal(l.Time) || !bytes.Equal(back.Text, l.Text) || back.Stream != l.Stream || back.Partial != l.Partial || back.Notice != l.Notice {
			t.Fatalf("got %+v, want %+v", back, l)
		}
	})
}

// FuzzWriter: whatever comes in whatever pieces, the text comes out again.
func FuzzWriter(f *testing.F) {
	f.Add([]byte("a\nb\n\nc"), 3)
	f.Add(bytes.Repeat([]byte("x"), MaxText*2+5), 1000)
	f.Add([]byte("\n\n\n"), 1)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		if step <= 0 || len(in)/step > 10_000 {
			return
		}
		dir := t.TempDir()
		w := OpenWriter(Config{Dir: dir, MaxBytes: 1 << 30, Files: 2})
		for i := 0; i < len(in); i += step {
			w.Write(Stdout, in[i:min(i+step, len(in))])
			if i%3 == 0 {
				w.FlushPartial(Stdout)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if got := text(t, dir, Options{}); got != string(in) {
			t.Fatalf("got %q, want %q", got, in)
		}
	})
}

func text(t testing.TB, dir string, opts Options) string {
	t.Helper()
	var out bytes.Buffer
	if err := Copy(t.Context(), dir, opts, &out, &out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestPartialLines(t *testing.T) {
	dir := t.TempDir()
	w := OpenWriter(Config{Dir: dir, MaxBytes: 1 << 20, Files: 2})
	long := strings.Repeat("y", MaxText+10)
	w.Write(Stdout, []byte(long+"\n"))
	w.Write(Stdout, []byte("prompt: "))
	if !w.Pending(Stdout) || w.Pending(Stderr) {
		t.Error("pending is wrong")
	}
	w.FlushPartial(Stdout)
	w.Write(Stderr, []byte("between\n"))
	w.Write(Stdout, []byte("answer\n"))
	w.Write(Stdout, []byte("no end"))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := Read(t.Context(), dir, Options{}, func(l Line) error {
		tag := "F"
		if l.Partial {
			tag = "P"
		}
		got = append(got, fmt.Sprintf("%s %s %d", l.Stream, tag, len(l.Text)))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		fmt.Sprintf("stdout P %d", MaxText), "stdout F 10",
		"stdout P 8", "stderr F 7", "stdout F 6", "stdout P 6",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := text(t, dir, Options{Tail: 2}); got != "answer\nno end" && got != "prompt: between\nanswer\nno end" {
		t.Errorf("last 2 lines: %q", got)
	}
	if got := text(t, dir, Options{Tail: 1}); got != "no end" {
		t.Errorf("last line: %q", got)
	}
}

// fill writes numbered lines of 100 bytes.
func fill(w *Writer, from, to int) {
	for i := from; i < to; i++ {
		w.Write(Stdout, fmt.Appendf(nil, "%-99d\n", i))
	}
}

func numbers(t testing.TB, dir string, opts Options) (first, last, n int, gap bool) {
	t.Helper()
	first = -1
	err := Read(t.Context(), dir, opts, func(l Line) error {
		gap = gap || l.Gap
		var i int
		if _, err := fmt.Sscan(string(l.Text), &i); err != nil {
			return err
		}
		if first < 0 {
			first = i
		} else if i != last+1 {
			return fmt.Errorf("%d after %d", i, last)
		}
		last = i
		n++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return first, last, n, gap
}

func TestRotation(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by", "writer")
	w := OpenWriter(Config{Dir: dir, MaxBytes: MinFileBytes, Files: 3})
	fill(w, 0, 2000) // 150 bytes each, 218 to a file
	files, err := List(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 3 {
		t.Fatalf("files: got %v, want 3", files)
	}
	for i, f := range files {
		if f.Size > MinFileBytes {
			t.Errorf("%s has %d bytes, more than %d", f.Path, f.Size, MinFileBytes)
		}
		if last := i == len(files)-1; last != (f.Seq == 0) || !last && f.Seq != files[0].Seq+uint64(i) {
			t.Errorf("order: %v", files)
		}
	}
	if _, last, n, _ := numbers(t, dir, Options{}); last != 1999 || n < 400 || n > 700 {
		t.Errorf("got %d lines to %d", n, last)
	}
	for _, tail := range []int{1, 10, 300, 500} {
		if first, last, n, _ := numbers(t, dir, Options{Tail: tail}); n != min(tail, 2000-first) || last != 1999 || n < min(tail, 400) {
			t.Errorf("tail %d: got %d lines, %d to %d", tail, n, first, last)
		}
	}
	if _, _, n, _ := numbers(t, dir, Options{Tail: None}); n != 0 {
		t.Errorf("tail none: got %d lines", n)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// The next writer goes on where this one ended, with one file only.
	w = OpenWriter(Config{Dir: dir, MaxBytes: MinFileBytes, Files: 1})
	fill(w, 2000, 2300)
	w.Close()
	if files, err = List(dir); err != nil || len(files) != 1 {
		t.Errorf("files: got %v, %v, want one", files, err)
	}
}

func TestTornLineIsEnded(t *testing.T) {
	dir := t.TempDir()
	torn := AppendLine(nil, Line{Time: noon, Stream: Stdout, Text: []byte("whole")})
	torn = append(torn, "2026-11-24T12:00:00.0"...)
	if err := os.WriteFile(filepath.Join(dir, currentName), torn, 0o600); err != nil {
		t.Fatal(err)
	}
	w := OpenWriter(Config{Dir: dir})
	w.Write(Stdout, []byte("next\n"))
	w.Close()
	if got := text(t, dir, Options{}); got != "whole\nnext\n" {
		t.Errorf("got %q", got)
	}
}

func TestSinceAndStream(t *testing.T) {
	dir := t.TempDir()
	w := OpenWriter(Config{Dir: dir, MaxBytes: 1 << 20})
	at := noon
	w.now = func() time.Time { return at }
	for i := range 4 {
		at = noon.Add(time.Duration(i) * time.Minute)
		w.Write(Stdout, fmt.Appendf(nil, "out%d\n", i))
		w.Write(Stderr, fmt.Appendf(nil, "err%d\n", i))
	}
	w.Close()
	if got := text(t, dir, Options{Since: noon.Add(2 * time.Minute)}); got != "out2\nerr2\nout3\nerr3\n" {
		t.Errorf("since: got %q", got)
	}
	if got := text(t, dir, Options{Stream: Stderr, Tail: 2}); got != "err2\nerr3\n" {
		t.Errorf("stream: got %q", got)
	}
}

// TestFollowOverRotation: a follower that keeps up misses nothing, and ends
// when it is told that nothing more comes.
func TestFollowOverRotation(t *testing.T) {
	dir := t.TempDir()
	w := OpenWriter(Config{Dir: dir, MaxBytes: MinFileBytes, Files: 1000})
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			first, last, n, gap := numbers(t, dir, Options{Follow: true, Done: done})
			if first != 0 || last != 4999 || n != 5000 || gap {
				t.Errorf("got %d lines, %d to %d, gap %t", n, first, last, gap)
			}
		})
	}
	for i := 0; i < 5000; i += 100 {
		fill(w, i, i+100)
		time.Sleep(2 * time.Millisecond)
	}
	w.Close()
	close(done)
	wg.Wait()
}

// TestFollowTooSlow: what was rotated away meanwhile is marked.
func TestFollowTooSlow(t *testing.T) {
	dir := t.TempDir()
	w := OpenWriter(Config{Dir: dir, MaxBytes: MinFileBytes, Files: 2})
	fill(w, 0, 10)
	done := make(chan struct{})
	var gaps, lines int
	err := Read(t.Context(), dir, Options{Follow: true, Done: done}, func(l Line) error {
		if lines++; lines == 10 {
			fill(w, 10, 3000)
			w.Close()
			close(done)
		}
		if l.Gap {
			gaps++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if gaps != 1 || lines > 1000 {
		t.Errorf("got %d lines and %d gaps, want one gap", lines, gaps)
	}
}

func TestFollowBeforeTheFirstLine(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go func() {
		time.Sleep(20 * time.Millisecond)
		w := OpenWriter(Config{Dir: dir})
		w.Write(Stdout, []byte("hello\n"))
		w.Close()
	}()
	found := errors.New("found")
	err := Read(ctx, dir, Options{Follow: true, Tail: 5}, func(l Line) error {
		if string(l.Text) == "hello" {
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		t.Errorf("got %v", err)
	}
	cancel()
	if err := Read(ctx, dir, Options{Follow: true}, func(Line) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
	}
}

func TestOverlongForeignLineIsPassedOver(t *testing.T) {
	dir := t.TempDir()
	b := AppendLine(nil, Line{Time: noon, Stream: Stdout, Text: bytes.Repeat([]byte("z"), maxLine+1)})
	b = AppendLine(b, Line{Time: noon, Stream: Stdout, Text: []byte("short")})
	if err := os.WriteFile(filepath.Join(dir, currentName), b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range []Options{{}, {Tail: 1}} {
		if got := text(t, dir, o); got != "short\n" {
			t.Errorf("got %.40q", got)
		}
	}
}

func BenchmarkWriter(b *testing.B) {
	for _, size := range []int{20, 200} {
		b.Run(fmt.Sprintf("line=%d", size), func(b *testing.B) {
			w := OpenWriter(Config{Dir: b.TempDir(), MaxBytes: 10 << 20, Files: 2})
			defer w.Close()
			chunk := bytes.Repeat(append(bytes.Repeat([]byte("x"), size-1), '\n'), (64<<10)/size)
			b.SetBytes(int64(len(chunk)))
			b.ReportAllocs()
			for b.Loop() {
				w.Write(Stdout, chunk)
			}
		})
	}
}
