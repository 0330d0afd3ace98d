// SPDX-License-Identifier: Apache-2.0

package runtimetest

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/bulkheadhq/bulkhead/runtime"
)

func TestFakeConforms(t *testing.T) {
	node := NewNode()
	Run(t, func(*testing.T) runtime.Runtime { return node.Open() })
}

func TestFakeFaults(t *testing.T) {
	node := NewNode()
	node.AddImage("x")
	var fail string
	var with error
	node.Fault = func(step, _ string) error {
		if step == fail {
			return with
		}
		return nil
	}
	f := node.Open()
	spec := runtime.Spec{ID: "a", Image: "x", Command: []string{"sleep", "100"}, CgroupPath: "c/a", LogDir: t.TempDir()}
	broken := errors.New("broken")

	for _, step := range []string{"create:snapshot", "create:container", "create:task"} {
		fail, with = step, broken
		_, err := f.Create(t.Context(), spec)
		wantErr(t, step, err, broken)
		if ids, _ := f.List(t.Context()); len(ids) != 0 {
			t.Errorf("%s: left over: %v", step, ids)
		}
		with = ErrCrash
		_, err = f.Create(t.Context(), spec)
		wantErr(t, step, err, ErrCrash)
		if ids, _ := f.List(t.Context()); !slices.Equal(ids, []string{"a"}) {
			t.Errorf("%s: a crash leaves %v", step, ids)
		}
		fail = ""
		_, err = f.Create(t.Context(), spec)
		wantErr(t, "create over leftovers", err, runtime.ErrExists)
		_, err = f.Find(t.Context(), "a")
		wantErr(t, "find", err, runtime.ErrNotFound)
		if err := f.Remove(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []string{"start", "find", "wait", "kill", "exec", "list"} {
		fail = ""
		task := create(t, f, spec)
		fail, with = step, broken
		var err error
		switch step {
		case "start":
			err = task.Start(t.Context())
		case "find":
			_, err = f.Find(t.Context(), "a")
		case "wait":
			_, err = task.Wait(t.Context())
		case "kill":
			err = task.Kill(t.Context(), 9, false)
		case "exec":
			_, err = task.Exec(t.Context(), runtime.ExecSpec{Command: []string{"true"}}, runtime.IO{})
		case "list":
			_, err = f.List(t.Context())
		}
		wantErr(t, step, err, broken)
		fail = ""
		if err := f.Remove(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFakeOOMAndLoss(t *testing.T) {
	node := NewNode()
	node.AddImage("x")
	f := node.Open()
	spec := runtime.Spec{ID: "a", Image: "x", Command: []string{"oom"}, CgroupPath: "c/a", LogDir: t.TempDir()}
	if exit := wait(t, launch(t, f, spec)); !exit.OOMKilled || exit.Code != 137 {
		t.Errorf("got %+v", exit)
	}
	node.Lose("a")
	_, err := f.Find(t.Context(), "a")
	wantErr(t, "find", err, runtime.ErrNotFound)
	if ids, _ := f.List(t.Context()); strings.Join(ids, " ") != "a" {
		t.Errorf("list: got %v", ids)
	}
}
