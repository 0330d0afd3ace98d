// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// buffer is what a test reads while a command still writes.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// background is the program running in this process.
type background struct {
	out    *bufio.Reader
	stderr buffer
	code   chan int // the exit code; one send
}

func start(t *testing.T, f *fakeNode, args ...string) *background {
	t.Helper()
	t.Setenv("BULKHEAD_SOCKET", f.sock)
	t.Setenv("BULKHEAD_TENANT", "acme")
	r, w := io.Pipe()
	b := &background{out: bufio.NewReader(r), code: make(chan int, 1)}
	go func() {
		code := run(args, strings.NewReader(""), w, &b.stderr)
		w.Close()
		b.code <- code
	}()
	t.Cleanup(func() { r.Close() })
	return b
}

func (b *background) line(t *testing.T) string {
	t.Helper()
	line, err := b.out.ReadString('\n')
	if err != nil {
		t.Fatalf("got %q and %v; stderr %s", line, err, b.stderr.String())
	}
	return line
}

// A flow log that is followed goes on with what is new after a restart.
func TestFlowsOutlastTheAgent(t *testing.T) {
	f := newFakeNode(t)
	start(t, f, "run", "-d", "--name", "a", "alpine", "sleep").line(t)
	b := start(t, f, "flows", "-f", "a")
	f.egress(t, "flow", "start")
	for range 1 + len(flowsOf("start")) { // the header too
		b.line(t)
	}
	f.halt()
	f.egress(t, "flow", "more")
	f.start()
	more := flowsOf("more")
	for i := range more {
		if got, want := b.line(t), render.Flow(more[i]); got != want {
			t.Errorf("line %d after the restart: %q, want %q", i, got, want)
		}
	}
	if got := b.stderr.String(); !strings.Contains(got, "the agent went away") {
		t.Errorf("the reader is not told: %q", got)
	}
	f.set(func() { f.boxes[0].stop <- -1 })
	if rest, err := io.ReadAll(b.out); err != nil || len(rest) > 0 {
		t.Errorf("at the end: %q, %v", rest, err)
	}
	if code := <-b.code; code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// An agent that restarts must not cost a foreground run a byte, nor give it one
// twice.
func TestRunOutlastsTheAgent(t *testing.T) {
	f := newFakeNode(t)
	b := start(t, f, "run", "--name", "a", "alpine", "sh", "-c", "flood 5; hold; flood 5; exit 9")
	var got strings.Builder
	for range 5 {
		got.WriteString(b.line(t))
	}
	f.halt()
	close(f.held) // it writes and ends while nobody is there
	f.eventually("end", func() bool { return f.boxes[0].s.GetExit() != nil })
	f.start()
	rest, err := io.ReadAll(b.out)
	if err != nil {
		t.Fatal(err)
	}
	got.Write(rest)
	want := strings.Repeat("line 0\nline 1\nline 2\nline 3\nline 4\n", 2)
	if got.String() != want {
		t.Errorf("output: got %q, want %q", got.String(), want)
	}
	if code := <-b.code; code != 9 {
		t.Errorf("exit code: got %d, want 9", code)
	}
	if s := b.stderr.String(); !strings.Contains(s, "the agent went away; waiting for it to come back; sandbox ") {
		t.Errorf("stderr: %s", s)
	}
}

func TestWaitOutlastsTheAgent(t *testing.T) {
	f := newFakeNode(t)
	runHere(t, f, 0, "run", "-d", "--name", "a", "alpine", "sh", "-c", "hold; exit 4")
	b := start(t, f, "wait", "a")
	f.eventually("first request", func() bool { return f.waits == 1 })
	f.halt()
	f.start()
	f.eventually("second request", func() bool { return f.waits >= 2 })
	f.halt()
	close(f.held)
	f.start()
	if got := b.line(t); got != "4\n" {
		t.Errorf("got %q, want 4", got)
	}
	if code := <-b.code; code != 0 {
		t.Errorf("exit code: got %d", code)
	}
}

func TestWatch(t *testing.T) {
	f := newFakeNode(t)
	runHere(t, f, 0, "run", "-d", "--name", "old", "alpine", "sleep")
	runHere(t, f, 0, "run", "--name", "gone", "alpine", "true")
	b := start(t, f, "ls", "--watch")
	expect := func(words ...string) {
		t.Helper()
		line := b.line(t)
		for _, w := range words {
			if !strings.Contains(line, w) {
				t.Fatalf("got %q, want %v", line, words)
			}
		}
	}
	expect("ID", "STATE", "CREATED")
	expect("old", "running") // and not the stopped one
	runHere(t, f, 0, "run", "-d", "--name", "new", "alpine", "sleep")
	expect("new", "running")
	runHere(t, f, 0, "stop", "new")
	expect("new", "stopped (by uid:1000)")
	f.halt()
	f.eventually("old to be there", func() bool { return len(f.boxes) == 3 })
	f.start()
	runHere(t, f, 0, "run", "-d", "--name", "newer", "alpine", "sleep")
	expect("newer", "running") // nothing is told twice
	runHere(t, f, 0, "kill", "newer")
	expect("newer", "stopped")
	runHere(t, f, 0, "rm", "newer")
	runHere(t, f, 0, "kill", "old")
	expect("old", "stopped")
}

func TestWatchJSON(t *testing.T) {
	f := newFakeNode(t)
	runHere(t, f, 0, "run", "-d", "--name", "old", "alpine", "sleep")
	b := start(t, f, "ls", "-a", "--watch", "-o", "json")
	for _, want := range []string{`"state":"STATE_RUNNING"`, `"state":"STATE_STOPPED"`, `"deleted":true`} {
		if line := b.line(t); !strings.HasPrefix(line, `{"sandbox":{"id":"`) || !strings.Contains(line, want) {
			t.Fatalf("got %s, want %s", line, want)
		}
		if strings.Contains(want, "RUNNING") {
			runHere(t, f, 0, "kill", "old")
		} else if strings.Contains(want, "STOPPED") {
			runHere(t, f, 0, "rm", "old")
		}
	}
}

// brokenLogs is a log whose stream breaks at random places; what is older than
// cut has been rotated away.
type brokenLogs struct {
	nodev1.NodeClient
	entries []*nodev1.LogsResponse
	rng     *rand.Rand
	sent    int // the furthest entry sent so far
}

type brokenStream struct {
	grpc.ClientStream
	l      *brokenLogs
	next   int
	breaks int
}

func (l *brokenLogs) Logs(context.Context, *nodev1.LogsRequest, ...grpc.CallOption) (grpc.ServerStreamingClient[nodev1.LogsResponse], error) {
	// Rotation takes only what has been read, and whole instants.
	first := 0
	for at := l.rng.IntN(l.sent + 1); first < at && l.entries[at].GetTimeNs() != l.entries[first].GetTimeNs(); first++ {
	}
	return &brokenStream{l: l, next: first, breaks: first + l.rng.IntN(len(l.entries)-first+2)}, nil
}

func (s *brokenStream) Recv() (*nodev1.LogsResponse, error) {
	if s.next == s.breaks && s.next < len(s.l.entries) {
		return nil, status.Error(codes.Unavailable, "error reading from server: EOF")
	}
	if s.next == len(s.l.entries) {
		return nil, io.EOF
	}
	e := s.l.entries[s.next]
	s.next++
	s.l.sent = max(s.l.sent, s.next-1)
	return &nodev1.LogsResponse{Stream: e.GetStream(), TimeNs: e.GetTimeNs(), Data: e.GetData()}, nil
}

func TestFollowResumesAtTheByte(t *testing.T) {
	for seed := range uint64(500) {
		rng := rand.New(rand.NewPCG(seed, 1))
		l := &brokenLogs{rng: rng}
		var want [3]string
		now := int64(1)
		for i := range 1 + rng.IntN(30) {
			now += rng.Int64N(2)
			e := &nodev1.LogsResponse{Stream: nodev1.Stream(1 + rng.IntN(2)), TimeNs: now, Data: fmt.Appendf(nil, "%d\n", i)}
			want[e.Stream] += string(e.Data)
			l.entries = append(l.entries, e)
		}
		var got [3]string
		f := &follower{node: l, req: &nodev1.LogsRequest{}, out: func(e *nodev1.LogsResponse) error {
			got[e.Stream] += string(e.Data)
			return nil
		}}
		for tries := 0; ; tries++ {
			err := f.follow(context.Background())
			if err == nil {
				break
			}
			if tries > 1000 {
				t.Fatalf("seed %d: no end", seed)
			}
		}
		if got != want {
			t.Fatalf("seed %d: got %q, want %q", seed, got, want)
		}
	}
}
