// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/gateway/config"
	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// The test binary is also the gateway: tests that kill one start it again with
// these set, so that it dies at an exact point of a commit.
const (
	childDir   = "BULKHEAD_TEST_GATEWAY_DIR"
	childPoint = "BULKHEAD_TEST_GATEWAY_KILL_AT" // "<point> <n>": the n-th time
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		child(dir)
	}
	os.Exit(m.Run())
}

func child(dir string) {
	point, count, _ := strings.Cut(os.Getenv(childPoint), " ")
	n, _ := strconv.ParseInt(count, 10, 64)
	var seen atomic.Int64
	fault := func(p string) error {
		if p == point && seen.Add(1) == n {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}
	if err := run(context.Background(), testConfig(dir), slog.New(slog.DiscardHandler), fault); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func testConfig(dir string) config.Config {
	cfg := config.Default()
	cfg.DataDir = filepath.Join(dir, "data")
	cfg.Listen = []config.Address{{Network: "unix", Addr: filepath.Join(dir, "gw.sock")}}
	return cfg
}

// startChild runs a gateway as a process and waits until it answers.
func startChild(t testing.TB, dir, killAt string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childDir+"="+dir, childPoint+"="+killAt)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	waitReady(t, testConfig(dir).Listen[0].Addr)
	return cmd
}

func waitReady(t testing.TB, sock string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if conn, err := net.Dial("unix", sock); err == nil {
			conn.Close()
			return
		}
	}
	t.Fatal("the gateway does not listen")
}

// start runs a gateway in this process; stop ends it and answers Run's error.
func start(t testing.TB, cfg config.Config) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg, slog.New(slog.DiscardHandler)) }()
	var once atomic.Bool
	stop = func() error {
		if !once.CompareAndSwap(false, true) {
			return nil
		}
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	waitReady(t, cfg.Listen[0].Addr)
	return stop
}

// client is a node's view of the gateway.
type client struct {
	usage   usagev1.UsageClient
	gateway gatewayv1.GatewayClient
	conn    *grpc.ClientConn
}

func dial(t testing.TB, sock string) client {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return client{usagev1.NewUsageClient(conn), gatewayv1.NewGatewayClient(conn), conn}
}

// push sends batches on one stream and answers the last acknowledgement, and
// the error that ended the stream, if one did.
func (c client) push(ctx context.Context, node string, batches ...[]*usagev1.Record) (acked uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	stream, err := c.usage.Push(ctx)
	if err != nil {
		return 0, err
	}
	for _, b := range batches {
		// An error of Send is io.EOF; Recv has the real one.
		stream.Send(&usagev1.PushRequest{NodeId: node, Records: b})
		resp, err := stream.Recv()
		if err != nil {
			return acked, err
		}
		acked = resp.GetNodeSeq()
	}
	return acked, stream.CloseSend()
}

func (c client) watermark(t testing.TB, node string) uint64 {
	t.Helper()
	resp, err := c.usage.Watermark(t.Context(), &usagev1.WatermarkRequest{NodeId: node}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetNodeSeq()
}

// totals asks for the exact sums by sandbox.
func (c client) totals(t testing.TB, req *gatewayv1.QueryUsageRequest) map[gatewaytest.Key]*big.Int {
	t.Helper()
	resp, err := c.gateway.QueryUsage(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	out := map[gatewaytest.Key]*big.Int{}
	for _, r := range resp.GetRows() {
		n, ok := new(big.Int).SetString(r.GetTotalDecimal(), 10)
		if !ok {
			t.Fatalf("got total %q", r.GetTotalDecimal())
		}
		out[gatewaytest.Key{Tenant: r.GetTenant(), Sandbox: r.GetSandbox(), Meter: r.GetMeter()}] = n
	}
	return out
}

func wantCode(t testing.TB, err error, want codes.Code, text string) {
	t.Helper()
	if got := status.Code(err); got != want || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("got %v, want %v with %q", err, want, text)
	}
}

func everything(*usagev1.Record) bool { return true }

// A stream that is open when the gateway stops does not hold it up.
func TestStopWithOpenStreams(t *testing.T) {
	cfg := testConfig(t.TempDir())
	stop := start(t, cfg)
	c := dial(t, cfg.Listen[0].Addr)
	stream, err := c.usage.Push(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := gatewaytest.NewNode("n1", 1)
	if err := stream.Send(&usagev1.PushRequest{NodeId: "n1", Records: n.Batch(3)}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := stop(); err != nil {
		t.Errorf("run: %v", err)
	}
	if took := time.Since(began); took > stopGrace/2 {
		t.Errorf("stopping took %v", took)
	}
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable, "")
	if _, err := os.Lstat(cfg.Listen[0].Addr); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket: got %v, want it removed", err)
	}
	start(t, cfg)
	if got := dial(t, cfg.Listen[0].Addr).watermark(t, "n1"); got != 3 {
		t.Errorf("after a restart: got watermark %d, want 3", got)
	}
}

func TestSecondGatewayIsRefused(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	cfg := testConfig(dir)
	start(t, cfg)
	same := testConfig(other)
	same.DataDir = cfg.DataDir
	err := Run(t.Context(), same, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "another gateway uses this directory") {
		t.Errorf("same directory: got %v", err)
	}
	if _, err := os.Lstat(same.Listen[0].Addr); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket: got %v, want none made", err)
	}
	same = testConfig(other)
	same.Listen = cfg.Listen
	err = Run(t.Context(), same, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("same socket: got %v", err)
	}
	if got := dial(t, cfg.Listen[0].Addr).watermark(t, "n"); got != 0 {
		t.Errorf("the first gateway: got %d, want it to answer 0", got)
	}
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	cfg := testConfig(dir)
	path := cfg.Listen[0].Addr
	// One that a killed gateway left behind.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	stop := start(t, cfg)
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := info.Mode(), os.ModeSocket|0o660; got != want {
		t.Errorf("got mode %v, want %v", got, want)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	err = Run(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("got %v, want a refusal", err)
	}
	if data, _ := os.ReadFile(path); string(data) != "mine" {
		t.Errorf("got %q, want the file untouched", data)
	}
}

func TestNotifiesSystemd(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	stop := start(t, testConfig(dir))
	read := func() string {
		buf := make([]byte, 100)
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	if got := read(); got != "READY=1" {
		t.Errorf("got %q, want READY=1", got)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != "STOPPING=1" {
		t.Errorf("got %q, want STOPPING=1", got)
	}
}

// A ledger that fails ends the gateway with an error, and says so to the node.
func TestLedgerFailureEndsTheGateway(t *testing.T) {
	cfg := testConfig(t.TempDir())
	boom := errors.New("disk on fire")
	done := make(chan error, 1)
	go func() {
		done <- run(context.Background(), cfg, slog.New(slog.DiscardHandler), func(point string) error {
			if point == "commit" {
				return boom
			}
			return nil
		})
	}()
	waitReady(t, cfg.Listen[0].Addr)
	_, err := dial(t, cfg.Listen[0].Addr).push(t.Context(), "n1", gatewaytest.NewNode("n1", 1).Batch(1))
	wantCode(t, err, codes.Unavailable, "")
	if err := <-done; !errors.Is(err, boom) {
		t.Errorf("run: got %v, want %v", err, boom)
	}
}
