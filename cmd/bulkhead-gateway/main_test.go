// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// binary is the command as it is installed.
var binary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "bulkhead-gateway")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "bulkhead-gateway")
	build := exec.Command("go", "build", "-ldflags", "-X main.version=1.2.3", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// run answers the exit code and both outputs.
func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func writeConfig(t *testing.T, dir, text string) string {
	t.Helper()
	path := filepath.Join(dir, "gw.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func goodConfig(t *testing.T, dir string) string {
	return writeConfig(t, dir, fmt.Sprintf("data_dir = %q\nlisten = [\"unix://%s/s\"]\n", dir, dir))
}

func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	bad := writeConfig(t, dir, "\nlisten = []\nlisen = []\n")
	none := filepath.Join(dir, "none.toml")
	ro := filepath.Join(t.TempDir(), "gw.toml")
	if err := os.WriteFile(ro, []byte("data_dir = \"/proc/none\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--config", bad}, 2, "bulkhead-gateway: " + bad + ":3: unknown key \"lisen\"; did you mean \"listen\"?\n"},
		{[]string{"--config", none}, 2, "bulkhead-gateway: " + none + ": no such file or directory\n"},
		{[]string{"verify", "--config", none}, 2, "bulkhead-gateway: " + none + ": no such file or directory\n"},
		{[]string{"--confg", "x"}, 2, "bulkhead-gateway: unknown flag: --confg\n"},
		{[]string{"verifi"}, 2, "bulkhead-gateway: unknown command \"verifi\"; see bulkhead-gateway --help\n"},
		{[]string{"verify", "x"}, 2, "bulkhead-gateway: unknown command \"x\"; see bulkhead-gateway verify --help\n"},
		{[]string{"--config", ro}, 1, "bulkhead-gateway: mkdir /proc/none: no such file or directory\n"},
	}
	for _, tt := range tests {
		code, stdout, stderr := run(t, tt.args...)
		if code != tt.code || stderr != tt.want || stdout != "" {
			t.Errorf("%q: got %d, %q, %q, want %d, %q", tt.args, code, stdout, stderr, tt.code, tt.want)
		}
	}
	code, stdout, _ := run(t, "--version")
	if want := "bulkhead-gateway version 1.2.3\n"; code != 0 || stdout != want {
		t.Errorf("--version: got %d, %q, want %q", code, stdout, want)
	}
}

// The installed command: push, kill -9, verify while it is down, start, push,
// verify while it runs, stop.
func TestLifeOfAGateway(t *testing.T) {
	dir := t.TempDir()
	file := goodConfig(t, dir)
	n := gatewaytest.NewNode("n1", 1)

	gw := startGateway(t, file, dir)
	push(t, dir, n.Batch(5), 5)
	gw.Process.Kill()
	gw.Wait()

	verify(t, file, 0, "n1: 5 records, chain whole\n")

	gw = startGateway(t, file, dir)
	push(t, dir, n.Sent, 5)
	push(t, dir, n.Batch(5), 10)
	verify(t, file, 0, "n1: 10 records, chain whole\n")
	code, _, stderr := run(t, "--config", file)
	if code != 1 || !strings.Contains(stderr, "another gateway uses this directory") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("second gateway: got %d, %q", code, stderr)
	}
	gw.Process.Signal(syscall.SIGTERM)
	if err := gw.Wait(); err != nil {
		t.Errorf("after TERM: got %v, want exit 0", err)
	}

	// A clean stop leaves no WAL; what is in the file is whole.
	if _, err := os.Stat(filepath.Join(dir, "ledger.db-wal")); !os.IsNotExist(err) {
		t.Errorf("WAL after a clean stop: got %v, want none", err)
	}
	code, _, stderr = run(t, "verify", "--config", file, "--node", "nobody")
	if want := "bulkhead-gateway: verify node nobody: no such node\n"; code != 1 || stderr != want {
		t.Errorf("got %d, %q, want 1, %q", code, stderr, want)
	}
}

func startGateway(t *testing.T, file, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(binary, "--config", file)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if conn, err := net.Dial("unix", filepath.Join(dir, "s")); err == nil {
			conn.Close()
			return cmd
		}
	}
	t.Fatal("the gateway does not listen")
	return nil
}

func push(t *testing.T, dir string, records []*usagev1.Record, want uint64) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := usagev1.NewUsageClient(conn).Push(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.Send(&usagev1.PushRequest{NodeId: "n1", Records: records})
	resp, err := stream.Recv()
	if err != nil || resp.GetNodeSeq() != want {
		t.Errorf("got %v, %v, want acknowledgement of %d", resp, err, want)
	}
}

func verify(t *testing.T, file string, wantCode int, want string) {
	t.Helper()
	code, stdout, stderr := run(t, "verify", "--config", file)
	if code != wantCode || stdout != want {
		t.Errorf("verify: got %d, %q, %q, want %d, %q", code, stdout, stderr, wantCode, want)
	}
}
